#!/usr/bin/env bash
# Capstan against PyTorch on this machine, side by side in one run: GPT-2 124M at 4 x 256 and a small model at
# 16 x 256, f32, forward + backward + AdamW. The engines take turns, so that a slow minute hits all of them.
#   tests/benchmarks/run.sh [rounds] [gpt2|small]   (default 3 of both; needs a build in build/ and, once, the Python registry)
#   tests/benchmarks/run.sh comm [rounds] collectives among ranks instead
#   tests/benchmarks/run.sh save [rounds] the snapshot of a checkpoint against memcpy
#   tests/benchmarks/run.sh fsdp [steps]  2 ranks of 1 thread against one process of 2, GPT-2, 4,096 tokens a step
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
if [ "${1:-}" = save ]; then
  "$root/build/bin/save_bench" "$root/build/bin/capstan" "$root/build/save_bench" "${2:-7}"
  exit
fi
if [ "${1:-}" = fsdp ]; then
  program=${CAPSTAN_BENCH_PROGRAM:-$root/build/bin/capstan}
  out=$root/build/benchmarks/fsdp
  rm -rf "$out" && mkdir -p "$out"
  words="$here/fsdp.yaml train.steps=${2:-5}"
  "$program" train $words run.threads=2 "run.dir=$out/one" > "$out/one.log"
  "$program" train $words --ranks 2 "run.dir=$out/two" > "$out/two.log"
  for run in one two; do
    sed -n 's/.*"seconds":\([0-9.]*\).*"tokens_per.*/\1/p' "$out/$run/metrics.jsonl" | tail -n +2 | sort -n |
      awk -v run=$run '{t[NR] = $1} END {printf "%s: %.2f s a step (median of %d)\n", run, t[int((NR + 1) / 2)], NR}'
  done
  grep -A9 '^communication' "$out/two.log"
  exit
fi
rounds=${1:-3}
shapes=(${2:-gpt2 small})
for shape in "${shapes[@]}"; do
  [ -e "$here/$shape.yaml" ] && [ "$shape" != fsdp ] || { echo "unknown shape '$shape': expected gpt2 or small" >&2; exit 2; }
done
program=${CAPSTAN_BENCH_PROGRAM:-$root/build/bin/capstan}
threads=${CAPSTAN_BENCH_THREADS:-2}
out=$root/build/benchmarks
mkdir -p "$out"
python=${CAPSTAN_BENCH_PYTHON:-$root/build/peer-venv/bin/python}
[ -x "$python" ] || "$here/setup_peer.sh"
[ -x "$program" ] || { echo "no program at $program: run ./capstan --version first" >&2; exit 1; }
: > "$out/results.jsonl"
for round in $(seq "$rounds"); do
  for shape in "${shapes[@]}"; do
    "$program" bench "$here/$shape.yaml" run.threads="$threads" --steps 5 --json >> "$out/results.jsonl"
    "$python" "$here/peer_pytorch.py" --shape "$shape" --form eager --threads "$threads" --steps 4 >> "$out/results.jsonl"
    # The best form: compiled, fused, and an allocator that never gives memory back.
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000 \
      "$python" "$here/peer_pytorch.py" --shape "$shape" --form best --threads "$threads" --steps 4 2> "$out/compile.log" >> "$out/results.jsonl"
    echo "round $round, $shape: done" >&2
  done
done
"$python" "$here/report.py" "$out/results.jsonl"
for shape in "${shapes[@]}"; do
  echo
  "$program" bench "$here/$shape.yaml" run.threads="$threads" --steps 4 --profile
done
