#!/usr/bin/env bash
# What run.sh says and how it ends, with stand-ins for the programs and for nvidia-smi: no GPU, no build.
set -uo pipefail
cd "$(dirname "$(realpath "$0")")/../.." || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OUT=$work/out
home=$work/home
failures=0
mkdir -p "$home/bin" "$home/lib" "$home/share/capstan/bench" "$work/path"
program() { # PATH TEXT
  printf '#!/bin/bash\n%s\n' "$2" >"$1"
  chmod +x "$1"
}
# Trains, with other losses on the CPU for bf16 of the llama recipe; writes texts.
program "$home/bin/capstan" 'case $1 in
  train)
    for word; do case $word in run.dir=*) folder=${word#run.dir=} ;; esac; done
    [[ "$*" == *mxfp8* ]] && { echo "block scales need 10.0"; exit 2; }
    loss=5.25; [[ "$*" == *llama*device=cpu*bf16* && "$*" != *precision.linear* ]] && loss=9
    mkdir -p "$folder"; printf "{\"step\": 1, \"loss\": $loss}\n" >"$folder/metrics.jsonl"
    echo "step 1: validation loss $loss"; echo "done: 1 step"; echo "try: capstan generate $folder" ;;
  generate) echo "a text"; echo "32 tokens, 9 tokens/s" >&2 ;;
esac'
for name in gpu_ops gpu_ranks gpu_graphs capstan_gpu_kernels; do program "$home/bin/$name" 'echo "$@" >>"$0.calls"; echo "[  PASSED  ] 12 tests."; echo "[  SKIPPED ] 3 tests."'; done
program "$work/path/nvidia-smi" 'case $* in *compute_cap*) echo 9.0 ;; *index*) echo 0 ;; *) echo "stand-in" ;; esac'
program "$work/path/compute-sanitizer" 'echo "$@" >>"$0.calls"; echo "========= ERROR SUMMARY: 0 errors"'

run() { # NAME CODE PATH WORDS...: leaves what it said in $work/said
  local name=$1 want=$2 path=$3 code
  shift 3
  PATH=$path timeout 100 tests/gpu/run.sh "$@" >"$work/said" 2>&1
  code=$?
  [ $code = "$want" ] || wrong "$name: exit code $code, expected $want"
}
wrong() {
  echo "WRONG: $1"
  cat "$work/said"
  failures=$((failures + 1))
}
says() { grep -qE -- "$1" "$work/said" || wrong "nothing like '$1'"; }
never_says() { if grep -qE -- "$1" "$work/said"; then wrong "something like '$1'"; fi; }
plain=/usr/local/bin:/usr/bin:/bin
with_gpu=$work/path:$plain

run "not a number" 2 "$with_gpu" --carried "$home" --minutes abc ops
says "whole number"
run "no time" 3 "$with_gpu" --carried "$home" --minutes 0 ops graphs
says "every op.* not run: no time is left"
run "all well" 0 "$with_gpu" --carried "$home" --minutes 08 ops graphs
says "every op .* pass .* PASSED 12 tests., SKIPPED 3 tests"
says "train gpt f32, cuda_graphs on .* pass .* validation loss 5.25"
says "likeliest tokens beside the CPU's .* pass .* equal"
never_says "try: capstan"
grep -q -- -Products "$home/bin/gpu_graphs.calls" || wrong "gpu_graphs did not run"

run "a failure" 1 "$with_gpu" --carried "$home" train
says "llama bf16: 50 losses beside the CPU's .*FAIL"
says "gpt bf16: 50 losses beside the CPU's .*pass"
lines=$(grep -cE ' (pass|FAIL)  ' "$OUT/table.txt") logs=$(tar -tzf "$OUT/logs.tar.gz" | grep -c '\.log$')
[ "$lines" = "$logs" ] || wrong "$lines checks, $logs logs"

run "fp8 on a Hopper" 0 "$with_gpu" --carried "$home" train_fp8
says "mxfp8 is refused .*pass"
run "nothing says what the GPU can do" 3 "$plain" --carried "$home" train_fp8
says "train gpt mxfp8 .*not run: nvidia-smi does not say"
never_says "integer expression"

run "sanitizers" 0 "$with_gpu" --carried "$home" memcheck memcheck_rows memcheck_ops racecheck racecheck_rows racecheck_ops
[ "$(grep -c -- '--tool memcheck --report-api-errors no' "$work/path/compute-sanitizer.calls")" = 3 ] || wrong "memcheck counts calls whose failure is expected"
[ "$(grep -c -- 'racecheck.*gpu_ops.*gtest_filter' "$work/path/compute-sanitizer.calls")" = 2 ] || wrong "racecheck leaves ops out"
if ! [ -e /usr/local/cuda/bin/compute-sanitizer ] && ! PATH=$plain command -v compute-sanitizer >/dev/null; then
  rm "$work/path/compute-sanitizer"
  run "no sanitizer" 3 "$with_gpu" --carried "$home" memcheck
  says "not run: there is no compute-sanitizer"
fi

echo "glibc 99.1" >"$home/share/capstan/built_on"
run "an older system" 2 "$with_gpu" --carried "$home" ops
says "this bundle needs glibc 99.1, here is"
printf 'glibc 2.17\ninstructions fpu avx9000\n' >"$home/share/capstan/built_on"
run "another processor" 2 "$with_gpu" --carried "$home" ops
says "has avx9000, which this one has not"
never_says "every op"
printf 'glibc 2.17\ninstructions fpu\n' >"$home/share/capstan/built_on"
run "as the builder" 0 "$with_gpu" --carried "$home" ops

[ $failures = 0 ] && echo "run.sh is as it should be"
exit $((failures > 0))
