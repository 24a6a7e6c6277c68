#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: the ops' own tests with the GPU as the device, the kernels' tests, training
# against the CPU, the same bits twice, a checkpoint across devices, and the first measurements. Ends with one table.
#   tests/gpu/run.sh [--carried FOLDER] [PART...]      parts: ops kernels train graphs ranks speed; all by default, each under 10 minutes
# Without --carried it builds into build-gpu. CUDA's libraries are looked for where pip and the toolkit put them.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
carried=
[ "${1:-}" = --carried ] && { carried=$(realpath "$2"); shift 2; }
parts=${*:-ops kernels train graphs ranks speed}
if [ -n "$carried" ]; then
  home=$carried
else
  cmake -S . -B build-gpu -DCAPSTAN_CUDA=ON >/dev/null && cmake --build build-gpu -j "$(nproc)" || exit 1
  home=$root/build-gpu
fi
folders=$home/lib
for name in libcublasLt.so.13 libcudnn.so.9 libnccl.so.2; do
  for place in $(python3 -c 'import site; print(*site.getsitepackages())' 2>/dev/null) /usr/local/cuda/lib64 /usr/lib/x86_64-linux-gnu; do
    found=$(find -L "$place" -maxdepth 4 -name "$name" -printf '%h\n' 2>/dev/null | head -1)
    [ -n "$found" ] && { folders=$folders:$found; break; }
  done
done
export LD_LIBRARY_PATH=$folders OMP_WAIT_POLICY=passive
out=${OUT:-$root/build-gpu/out}
mkdir -p "$out" build-gpu/data
table=$out/table.txt
: >"$table"
work=$(mktemp -d)
failed=0

line() { printf '%-46s %s\n' "$1" "$2" | tee -a "$table"; }

# check NAME COMMAND...: one line of the table; the log is kept.
check() {
  local name=$1 log begin=$SECONDS
  shift
  log=$out/$(echo "$name" | tr -c 'a-zA-Z0-9\n' _).log
  if "$@" >"$log" 2>&1; then
    line "$name" "pass  $((SECONDS - begin)) s  $(tail -1 "$log" | cut -c1-150)"
  else
    line "$name" "FAIL  $((SECONDS - begin)) s"
    grep -aE 'FAILED|Error|error|\[[a-z_ ]+\]|element|over' "$log" | head -30
    tail -3 "$log"
    failed=1
  fi
}

capstan=$home/bin/capstan
train() { # RECIPE FOLDER DEVICE overrides...
  local recipe=$1 folder=$2 device=$3
  shift 3
  "$capstan" train "tests/gpu/$recipe.yaml" "run.device=$device" "run.dir=$work/$folder" run.threads=8 "$@"
}
# Several ranks of this machine, started as torchrun would: no mpirun is needed.
ranks() { # COUNT RECIPE FOLDER overrides...
  local count=$1 recipe=$2 folder=$3 port=$((20000 + RANDOM % 20000)) jobs=() code=0 r
  shift 3
  for ((r = 0; r < count; ++r)); do
    RANK=$r LOCAL_RANK=$r WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count MASTER_ADDR=localhost MASTER_PORT=$port \
      timeout 120 "$capstan" train "tests/gpu/$recipe.yaml" run.device=cuda "run.dir=$work/$folder" run.threads=2 "$@" &
    jobs+=($!)
  done
  for r in "${jobs[@]}"; do wait "$r" || code=1; done
  return $code
}
compared() { # MODE A B
  python3 tests/gpu/compare.py "$1" "$work/$2" "$work/$3"
}

refused() { # TEXT COMMAND...: it must fail and say so
  local text=$1 said
  shift
  said=$("$@" 2>&1) && return 1
  echo "$said"
  echo "$said" | grep -q "$text"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee -a "$table"

for part in $parts; do
  case $part in
    ops)
      check "every op against f64, twice the same bits" timeout 420 "$home/bin/gpu_ops" '--gtest_filter=*OpTest*:Gpu*.*' --gtest_brief=1
      ;;
    kernels)
      check "kernels over odd shapes" timeout 300 "$home/bin/capstan_gpu_kernels" test
      if command -v compute-sanitizer >/dev/null; then
        check "kernels under memcheck" timeout 240 compute-sanitizer --tool memcheck --error-exitcode 9 "$home/bin/capstan_gpu_kernels" test rows
      fi
      ;;
    train)
      for recipe in gpt llama; do
        for type in f32 bf16; do
          check "train $recipe $type on the CPU" train $recipe "$recipe-$type-cpu" cpu precision.compute=$type
          check "train $recipe $type on the GPU" train $recipe "$recipe-$type-gpu" cuda precision.compute=$type
          check "  50 losses beside the CPU's" compared near "$recipe-$type-cpu" "$recipe-$type-gpu"
          check "  again on the GPU" train $recipe "$recipe-$type-again" cuda precision.compute=$type
          check "  the same bits" compared same "$recipe-$type-gpu" "$recipe-$type-again"
        done
        # mxfp8 where the chip has block scales: elsewhere the recipe must be refused.
        for linear in fp8 mxfp8; do
          if [ $linear = mxfp8 ] && [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | cut -d. -f1)" -lt 10 ]; then
            check "train $recipe mxfp8 is refused" refused "need 10.0" train $recipe "$recipe-mxfp8-gpu" cuda precision.compute=bf16 precision.linear=mxfp8
            continue
          fi
          check "train $recipe $linear on the CPU" train $recipe "$recipe-$linear-cpu" cpu precision.compute=bf16 precision.linear=$linear
          check "train $recipe $linear on the GPU" train $recipe "$recipe-$linear-gpu" cuda precision.compute=bf16 precision.linear=$linear
          check "  50 losses beside the CPU's" compared near "$recipe-$linear-cpu" "$recipe-$linear-gpu"
          check "  again on the GPU" train $recipe "$recipe-$linear-again" cuda precision.compute=bf16 precision.linear=$linear
          check "  the same bits" compared same "$recipe-$linear-gpu" "$recipe-$linear-again"
        done
      done
      check "checkpoint of the GPU, 30 steps" train gpt across cuda train.steps=50 checkpoint.every_steps=30 schedule.decay=constant
      rm -rf "$work/across/checkpoints/step_000050"* "$work/across/checkpoints/LATEST"
      check "  continued on the CPU" train gpt across cpu train.steps=50 checkpoint.every_steps=30 schedule.decay=constant
      check "checkpoint of the CPU, 30 steps" train gpt back cpu train.steps=50 checkpoint.every_steps=30 schedule.decay=constant
      rm -rf "$work/back/checkpoints/step_000050"* "$work/back/checkpoints/LATEST"
      check "  continued on the GPU" train gpt back cuda train.steps=50 checkpoint.every_steps=30 schedule.decay=constant
      check "  both beside each other" compared near across back
      ;;
    graphs)
      for recipe in gpt llama; do
        for type in f32 bf16; do
          for graphs in off on; do
            check "train $recipe $type, cuda_graphs $graphs" train $recipe "graphs-$recipe-$type-$graphs" cuda precision.compute=$type run.cuda_graphs=$graphs
          done
          check "  the same bits" compared same "graphs-$recipe-$type-off" "graphs-$recipe-$type-on"
        done
      done
      check "timed products" train gpt tuned-1 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
      check "timed products, read" train gpt tuned-2 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
      check "  the same bits" compared same tuned-1 tuned-2
      for recipe in gpt2_124m llama_1b; do
        for words in "run.cuda_graphs=off" "run.cuda_graphs=on" "run.cuda_graphs=on run.gemm_choice=tuned run.gemm_file=$work/bench.txt"; do
          echo "== $recipe $words" | tee -a "$table"
          # shellcheck disable=SC2086
          timeout 150 "$capstan" bench "tests/gpu/$recipe.yaml" $words 2>&1 | tee -a "$table"
        done
      done
      ;;
    ranks)
      check "collectives and meshes, ranks as threads" timeout 300 "$home/bin/gpu_ranks" --gtest_brief=1
      check "one rank" train gpt ranks_one cuda
      gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
      for way in staged nccl; do
        for n in 2 4; do
          [ $way = nccl ] && [ "$gpus" -lt "$n" ] && { line "$n ranks over $way" "not run: it wants $n GPUs, here are $gpus"; continue; }
          for axis in shard tensor pp; do
            check "$n ranks along $axis over $way" ranks "$n" gpt "$way-$axis-$n" "mesh.$axis=$n" mesh.gpu_communication=$way data.micro_batch=2
            check "  50 losses beside one rank's" compared near ranks_one "$way-$axis-$n"
          done
        done
      done
      ;;
    speed)
      timeout 120 "$home/bin/gpu_bench" 2>&1 | tee -a "$table"
      timeout 120 "$home/bin/capstan_gpu_kernels" bench 2>&1 | tee -a "$table"
      for recipe in gpt2_124m llama_1b gpt2_1558m; do
        echo "== $recipe" | tee -a "$table"
        timeout 150 "$capstan" bench "tests/gpu/$recipe.yaml" 2>&1 | tee -a "$table"
        timeout 150 "$capstan" bench "tests/gpu/$recipe.yaml" precision.linear=fp8 2>&1 | tee -a "$table"
      done
      echo "== gpt2_124m by op" | tee -a "$table"
      timeout 100 "$capstan" bench tests/gpu/gpt2_124m.yaml --profile 2>&1 | tee -a "$table"
      ;;
    *) echo "there is no part '$part': ops kernels train graphs ranks speed"; exit 2 ;;
  esac
done
rm -rf "$work"
echo "---- table"
cat "$table"
exit $failed
