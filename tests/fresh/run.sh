#!/usr/bin/env bash
# Does what a newcomer does, on bare systems: makes each release of Debian (bookworm: 12, trixie: 13) and Ubuntu (noble: 24.04)
# in a folder, clones this repository into it (what is committed), runs `./capstan train recipes/quickstart.yaml` and
# `./capstan test` there as root, and prints a table of times.
#   sudo tests/fresh/run.sh [--folder DIR] [--mirror URL] [--ubuntu-mirror URL] [--ubuntu-keyring FILE] [--train]
#                           [bookworm|trixie|noble|all]...
#   --folder   where the systems and logs go, outside the tree; default /var/tmp/capstan-fresh. The bare system is kept
#              there (SUITE.base) and copied for each run.
#   --mirror   a Debian mirror; default: the one this system's own apt sources name
#   --ubuntu-mirror   an Ubuntu mirror; default: the one this system's own apt sources name, or archive.ubuntu.com
#   --ubuntu-keyring  what its signature is checked with; default: that of the package ubuntu-keyring (Ubuntu, Debian 13)
#   --train    the first command only
# Needs root, debootstrap, git and the network. By hand, not in CI. Exits 1 if any command failed.
set -euo pipefail

die() { echo "fresh: $*" >&2; exit 1; }

# Every mount lives in a mount namespace of this run and goes with it, however the run ends.
if [[ ${1:-} != --inside ]]; then
  ((EUID == 0)) || die "needs root (debootstrap, chroot): sudo $0 $*"
  for tool in debootstrap git unshare; do
    command -v "$tool" > /dev/null || die "$tool is missing: apt-get install debootstrap git util-linux"
  done
  exec unshare --mount --propagation private "$0" --inside "$@"
fi
shift

folder=/var/tmp/capstan-fresh
mirror=
ubuntu_mirror=
ubuntu_keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg
suites=()
commands=("train recipes/quickstart.yaml" test)
while (($#)); do
  case $1 in
    --folder) folder=$(readlink -m "$2"); shift 2 ;;
    --mirror) mirror=$2; shift 2 ;;
    --ubuntu-mirror) ubuntu_mirror=$2; shift 2 ;;
    --ubuntu-keyring) ubuntu_keyring=$(readlink -m "$2"); shift 2 ;;
    --train) commands=("${commands[0]}"); shift ;;
    bookworm | trixie | noble) suites+=("$1"); shift ;;
    all) suites+=(bookworm trixie noble); shift ;;
    *) die "unknown word '$1': see the head of $0" ;;
  esac
done
((${#suites[@]})) || suites=(bookworm trixie noble)
tree=$(readlink -f "$(dirname "${BASH_SOURCE[0]}")/../..")
[[ $folder/ != "$tree"/* ]] || die "--folder must be outside the tree"
mkdir -p "$folder"

source_of() {  # source_of debian|ubuntu: a mirror of it among this system's apt sources, or nothing
  cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2> /dev/null | sed 's/#.*//' |
    grep -oE "https?://[^ ]+/$1(/|\$| )" | head -n 1 | tr -d ' ' || true
}
[[ -n $mirror ]] || mirror=$(source_of debian)
[[ -n $ubuntu_mirror ]] || ubuntu_mirror=$(source_of ubuntu)
[[ -n $ubuntu_mirror ]] || ubuntu_mirror=http://archive.ubuntu.com/ubuntu
for suite in "${suites[@]}"; do
  if [[ $suite != noble ]]; then
    [[ -n $mirror ]] || die "no Debian mirror among this system's apt sources: name one with --mirror URL"
  elif [[ ! -e $ubuntu_keyring ]]; then
    die "$ubuntu_keyring is missing, and noble's packages are checked with it: apt-get install ubuntu-keyring (Ubuntu, Debian" \
        "13), or name a copy with --ubuntu-keyring FILE"
  fi
done
[[ -z $(git -C "$tree" status --porcelain) ]] || echo "fresh: uncommitted changes are not part of the clone" >&2

make_system() {  # make_system SUITE: $folder/SUITE, bare, with a clone in /root/capstan
  local suite=$1 base=$folder/$1.base root=$folder/$1 from=$mirror script=() extra=()
  if [[ ! -e $base/.complete ]]; then
    rm -rf "$base"
    if [[ $suite == noble ]]; then
      # universe has most of the libraries. The script of all Ubuntu releases is named after the first; older debootstraps
      # (Debian 12's) do not know noble.
      from=$ubuntu_mirror script=(gutsy) extra=('--components=main,universe' --keyring="$ubuntu_keyring")
    fi
    [[ $from != https:* ]] || extra+=(--include=ca-certificates)
    debootstrap --variant=minbase "${extra[@]}" "$suite" "$base" "$from" "${script[@]}" > "$folder/$suite.debootstrap.log" 2>&1 ||
      die "debootstrap failed: see $folder/$suite.debootstrap.log"
    touch "$base/.complete"
  fi
  rm -rf "$root"
  cp -a "$base" "$root"
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  apt-config dump | grep -i '^Acquire::.*proxy' > "$root/etc/apt/apt.conf.d/90proxy" || true
  git clone --quiet "$tree" "$root/root/capstan"
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount --rbind /sys "$root/sys"
}

seconds=0
inside() {  # inside SUITE LOG WORDS...: ./capstan WORDS in the system; its wall time in $seconds
  local root=$folder/$1 log=$2 begin=$SECONDS status=0
  shift 2
  env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb \
    chroot "$root" bash -c 'cd /root/capstan && exec ./capstan "$@"' capstan "$@" > "$log" 2>&1 < /dev/null || status=$?
  seconds=$((SECONDS - begin))
  ((status == 0)) || { echo "fresh: ./capstan $* exited $status; the end of $log:" >&2; tail -n 15 "$log" >&2; }
  return "$status"
}

failed=0
table=$(printf '%-10s %-6s %-22s %-8s %s' system cores command seconds result)
for suite in "${suites[@]}"; do
  echo "fresh: making $suite in $folder/$suite" >&2
  make_system "$suite"
  for words in "${commands[@]}"; do
    log=$folder/$suite.${words%% *}.log
    echo "fresh: $suite: ./capstan $words (log: $log)" >&2
    result=ok
    # shellcheck disable=SC2086
    inside "$suite" "$log" $words || { result=FAILED; failed=1; }
    summary=$(grep -E 'tests passed|built in' "$log" | sed 's/^capstan: //' | paste -sd ';' || true)
    table+=$'\n'$(printf '%-10s %-6s %-22s %-8s %s' "$suite" "$(nproc)" "${words/recipes\//}" "$seconds" "$result${summary:+ ($summary)}")
  done
done
printf '%s\n' "$table" | tee "$folder/table.txt"
exit "$failed"
