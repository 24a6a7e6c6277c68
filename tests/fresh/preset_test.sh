#!/usr/bin/env bash
# The README's other way in, `cmake --preset release`: it configures, into a folder of its own.
#   preset_test.sh TREE CMAKE
set -euo pipefail
tree=$1 cmake=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
die() { printf 'FAILED: %s\n' "$*" >&2; cat "$work/said" >&2; exit 1; }

cd "$tree"
"$cmake" --preset release -B "$work/build" > "$work/said" 2>&1 || die "cmake --preset release"
for entry in CMAKE_BUILD_TYPE:STRING=Release CMAKE_GENERATOR:INTERNAL=Ninja; do
  grep -qxF "$entry" "$work/build/CMakeCache.txt" || die "expected $entry in the cache"
done
[[ -e $work/build/build.ninja ]] || die "there is nothing to build"
