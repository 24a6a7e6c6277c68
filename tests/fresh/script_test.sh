#!/usr/bin/env bash
# ./capstan on systems that are too old, or not: what dpkg, apt, g++ and CMake say is played by small scripts first in PATH,
# and nothing is installed or built.
#   script_test.sh TREE
set -euo pipefail
tree=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
die() { printf 'FAILED: %s\n' "$*" >&2; cat "$work/said" >&2; exit 1; }

mkdir "$work"/{tree,bin}
cp "$tree"/{capstan,packages.apt,CMakeLists.txt} "$work/tree"
# installed and offered: lines of PACKAGE VERSION. What apt-get installs is what was offered.
cat > "$work/bin/dpkg-query" << 'END'
#!/usr/bin/env bash
shift 2  # -W -f
format=$1 && shift
for package in "$@"; do
  version=$(sed -n "s/^$package //p" "$WORK/installed")
  [[ -n $version ]] || continue
  if [[ $format == *Version* ]]; then echo "installed $version"; else echo "installed $package"; fi
done
END
cat > "$work/bin/apt-cache" << 'END'
#!/usr/bin/env bash
version=$(sed -n "s/^$2 //p" "$WORK/offered")
printf '%s:\n  Installed: (none)\n  Candidate: %s\n  Version table:\n' "$2" "${version:-(none)}"
END
cat > "$work/bin/apt-get" << 'END'
#!/usr/bin/env bash
echo "$*" >> "$WORK/apt"
if [[ $1 == update ]]; then cp "$WORK/offered_later" "$WORK/offered" 2> /dev/null; exit 0; fi
for package in "$@"; do
  [[ $package != -* && $package != install ]] || continue
  grep "^$package " "$WORK/offered" || echo "$package 1.0"
done > "$WORK/installed"
END
printf '#!/usr/bin/env bash\n[[ ! -e $WORK/no_sudo ]] || exit 1\nshift\nexec "$@"\n' > "$work/bin/sudo"
cat > "$work/bin/g++" << 'END'
#!/usr/bin/env bash
version=$(sed -n 's/^g++ .*:\([0-9.]*\)-.*/\1/p' "$WORK/installed")
[[ -n $version ]] || exit 127
echo "$version"
END
cat > "$work/bin/cmake" << 'END'
#!/usr/bin/env bash
version=$(sed -n 's/^cmake \([0-9.]*\).*/\1/p' "$WORK/installed")
[[ -n $version ]] || exit 127
if [[ $1 == --version ]]; then echo "cmake version $version"; else echo "configuring was reached"; exit 7; fi
END
chmod +x "$work"/bin/*

jammy=$'g++ 4:11.2.0-1ubuntu1\nlibdnnl-dev 2.2.4+ds-2\ncmake 3.22.1-1ubuntu1'
noble=$'g++ 4:13.2.0-7ubuntu1\nlibdnnl-dev 3.1.1-2\ncmake 3.28.3-1build7'
others=$(sed 's/#.*//; /^[[:space:]]*$/d; /^\(g++\|libdnnl-dev\|cmake\)$/d; s/$/ 1.0/' "$tree/packages.apt")
all_three="too old here: g++ 11.2.0 (12 or newer is needed), oneDNN 2.2.4 (2.6 or newer is needed), CMake 3.22.1 (3.25 or newer is needed). Use Ubuntu 24.04 or Debian 12 or later."

run() {  # run CASE INSTALLED OFFERED [WORDS...]: what ./capstan build says, in $work/said
  local case=$1
  printf '%s\n' "$2" > "$work/installed"
  printf '%s\n' "$3" > "$work/offered"
  shift 3
  rm -rf "$work/apt" "$work/tree/build"
  printf '== %s\n' "$case"
  local status=0
  "${as[@]}" env -i HOME="$work" WORK="$work" PATH="$work/bin:/usr/bin:/bin" "${environment[@]}" "$work/tree/capstan" build "$@" > "$work/said" 2>&1 ||
    status=$?
  [[ $status == 1 ]] || die "$case: expected exit code 1, got $status"
}
expect() { grep -qF -- "$1" "$work/said" || die "expected: $1"; }
environment=()
as=()  # who runs it

run "Ubuntu 22.04, bare: refused before anything is installed" "" "$jammy"
expect "$all_three"
[[ ! -e $work/apt ]] || die "apt-get was called: $(cat "$work/apt")"

run "Ubuntu 22.04 with its packages" "$jammy"$'\n'"$others" ""
expect "$all_three"

printf '%s\n' "$jammy" > "$work/offered_later"
run "Ubuntu 22.04 whose package lists come with apt-get update: refused after the installation" "" ""
expect "$all_three"
[[ -e $work/apt ]] || die "apt-get was not called"
rm "$work/offered_later"

run "only oneDNN is too old" "${noble/3.1.1/2.2.4}"$'\n'"$others" ""
expect "too old here: oneDNN 2.2.4 (2.6 or newer is needed). Use Ubuntu 24.04"

run "only CMake is too old: a newer one will do" "${noble/3.28.3/3.22.1}"$'\n'"$others" ""
expect "too old here: CMake 3.22.1 (3.25 or newer is needed). Put a newer one first in PATH"

run "another compiler is named: g++ does not matter, CMake looks at that one" "${noble/13.2.0/11.2.0}"$'\n'"$others" "" \
  -DCMAKE_CXX_COMPILER=g++-12
expect "configuring was reached"
environment=(CXX=g++-12)
run "the same through CXX" "${noble/13.2.0/11.2.0}"$'\n'"$others" ""
expect "configuring was reached"
environment=()

run "Ubuntu 24.04, bare: installs everything and configures" "" "$noble"
expect "configuring was reached"
grep -q "^install .*libdnnl-dev" "$work/apt" || die "nothing was installed"

touch "$work/no_sudo"
if ((EUID == 0)); then as=(setpriv --reuid 65534 --regid 65534 --clear-groups) && chmod -R a+rwX "$work"; fi
run "without root: the line to run is printed, nothing is installed" "g++ 4:13.2.0-7ubuntu1" "$noble"
expect "installing them needs root. Run this line, then ./capstan again:"
expect "  sudo apt-get update && sudo apt-get install -y --no-install-recommends "
grep -q "  sudo apt-get .* libdnnl-dev" "$work/said" || die "the line does not name what is missing"
! grep -q "  sudo apt-get .* g++\( \|$\)" "$work/said" || die "the line names what is there"
[[ ! -e $work/apt ]] || die "apt-get was called: $(cat "$work/apt")"

# What is built starts at once: the least of ten times, since other work may run here.
stamp=$tree/build/.stamp
if [[ -e $stamp && $(head -n 1 "$stamp") == "$tree" && -z $(find "$tree"/{core,kernels,plugins,cmake,CMakeLists.txt,packages.apt} -newer "$stamp" -print -quit) ]]; then
  least=99999
  for _ in {1..10}; do
    begin=$(date +%s%N)
    "$tree/capstan" --version > "$work/said" 2>&1
    took=$((($(date +%s%N) - begin) / 1000000))
    ((took >= least)) || least=$took
  done
  printf '== ./capstan --version: %d ms\n' "$least"
  ((least < 300)) || die "./capstan --version took $least ms, expected less than 300"
fi
printf 'all good\n'
