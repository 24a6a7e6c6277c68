#!/usr/bin/env bash
# Makes the virtual environment of the peer that benchmarks compare with: the current PyTorch of the Python registry.
#   tests/benchmarks/setup_peer.sh [folder]     default build/peer-venv; prints the path of its python
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../..
venv=${1:-$root/build/peer-venv}
if ! "$venv/bin/python" -c 'import torch, numpy' > /dev/null 2>&1; then
  python3 -c 'import venv, ensurepip' 2> /dev/null ||
    { echo "setup_peer: needs Python's venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
  mkdir -p "$(dirname "$venv")"
  python3 -m venv "$venv" >&2
  "$venv/bin/pip" install --quiet --upgrade torch numpy >&2
fi
"$venv/bin/python" -c 'import sys, torch; print("setup_peer: PyTorch", torch.__version__, file=sys.stderr)'
readlink -f "$(dirname "$venv")" | sed "s|\$|/$(basename "$venv")/bin/python|"
