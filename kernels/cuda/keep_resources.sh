#!/bin/sh
# Runs a compiler ("$@") and keeps what ptxas says of each kernel beside the object, as OBJECT.ptxas: tests compare it with a
# table. All other words go where they went.
object=
before=
for word in "$@"; do
  [ "$before" = -o ] && object=$word
  before=$word
done
errors=$(mktemp) || exit 1
"$@" 2>"$errors"
code=$?
ptxas='^ptxas info|^ *[0-9]+ bytes stack frame'
case $object in
  *.o)
    grep -E "$ptxas" "$errors" >"$object.ptxas"
    grep -vE "$ptxas" "$errors" >&2
    ;;
  *) cat "$errors" >&2 ;;
esac
rm -f "$errors"
exit $code
