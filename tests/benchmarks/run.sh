#!/usr/bin/env bash
# Capstan against PyTorch on this machine, side by side in one run: GPT-2 124M at 4 x 256 and a small model at
# 16 x 256, f32, forward + backward + AdamW. The engines take turns, so that a slow minute hits all of them.
#   tests/benchmarks/run.sh [rounds]      (default 3; needs a build in build/ and, once, the Python registry)
#   tests/benchmarks/run.sh comm [rounds] collectives among ranks instead
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ "${1:-}" = comm ]; then
  # Collectives among ranks on this machine: memcpy, this program (any memory, shared memory), MPI's own; what hides.
  bench=$root/build/bin/comm_bench
  [ -x "$bench" ] || { echo "no program at $bench: build with CAPSTAN_TESTS=ON first" >&2; exit 1; }
  for np in 2 4; do
    for form in capstan shared mpi; do
      mpirun --allow-run-as-root --oversubscribe --bind-to none -np $np "$bench" $form "${2:-9}"
    done
  done
  mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 "$bench" overlap "${2:-9}"
  mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 "$bench" mpi-overlap "${2:-9}"
  exit
fi
rounds=${1:-3}
program=${CAPSTAN_BENCH_PROGRAM:-$root/build/bin/capstan}
threads=${CAPSTAN_BENCH_THREADS:-2}
out=$root/build/benchmarks
mkdir -p "$out"
python=${CAPSTAN_BENCH_PYTHON:-$root/build/peer-venv/bin/python}
[ -x "$python" ] || "$here/setup_peer.sh"
[ -x "$program" ] || { echo "no program at $program: run ./capstan --version first" >&2; exit 1; }
: > "$out/results.jsonl"
for round in $(seq "$rounds"); do
  for shape in gpt2 small; do
    "$program" bench "$here/$shape.yaml" run.threads="$threads" --steps 5 --json >> "$out/results.jsonl"
    "$python" "$here/peer_pytorch.py" --shape "$shape" --form eager --threads "$threads" --steps 4 >> "$out/results.jsonl"
    # The best form: compiled, fused, and an allocator that never gives memory back.
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000 \
      "$python" "$here/peer_pytorch.py" --shape "$shape" --form best --threads "$threads" --steps 4 2> "$out/compile.log" >> "$out/results.jsonl"
    echo "round $round, $shape: done" >&2
  done
done
"$python" "$here/report.py" "$out/results.jsonl"
for shape in gpt2 small; do
  echo
  "$program" bench "$here/$shape.yaml" run.threads="$threads" --steps 4 --profile
done
