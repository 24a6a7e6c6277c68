#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: the ops' own tests with the GPU as the device, the kernels' tests, both
# under compute-sanitizer, training against the CPU, the same bits twice, checkpoints across devices, and every measurement,
# beside PyTorch's where that is installed. Ends with one table; exit code 1 when anything failed.
#   tests/gpu/run.sh [--carried BUNDLE] [--minutes M] [--python PYTHON] [PART...]
# Parts (all by default; each ends within 10 minutes): the functions part_* below, in their order, the most telling first. BUNDLE is
# what collect.sh made; without it, it builds into build-gpu. --minutes ends the whole within M minutes: what has no time left is
# said to have not run. CUDA's libraries are looked for where pip and the toolkit put them; PYTHON is one that has PyTorch.
# Results, in $OUT or build-gpu/out: table.txt, and every log in logs.tar.gz, both up to date after each part.
#
# On a machine that is lent for 15 minutes, its start included, in two calls:
#   tests/gpu/run.sh --carried .gpu/bundle.tar.gz --minutes 6 ops train steps_gpt2 graphs
#   tests/gpu/run.sh --carried .gpu/bundle.tar.gz --minutes 5 speed ranks train_fp8 checkpoints kernels
set -uo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/../.." || exit 2
root=$PWD
every_part=$(sed -n 's/^part_\([a-z0-9_]*\)().*/\1/p' "$self")
carried=
python=python3
minutes=600
while :; do
  case ${1:-} in
    --carried) carried=$(realpath -e "${2:?--carried wants what collect.sh made}") || exit 2; shift 2 ;;
    --python) python=${2:?--python wants a program}; shift 2 ;;
    --minutes) minutes=${2:?--minutes wants a number}; shift 2 ;;
    --*) echo "there is no option '$1': expected --carried, --minutes, --python" >&2; exit 2 ;;
    *) break ;;
  esac
done
parts=${*:-$every_part}
for part in $parts; do
  grep -qx "$part" <<<"$every_part" || { echo "there is no part '$part': expected one of ${every_part//$'\n'/ }" >&2; exit 2; }
done
out=${OUT:-$root/build-gpu/out}
mkdir -p "$out" build-gpu/data
table=$out/table.txt
: >"$table"
work=$(mktemp -d)
logs=$work/logs
mkdir "$logs"
failed=0
part_begin=$SECONDS
# Logs that came so far in one file, and at the end the table once more, however it ends.
keep_logs() { tar -C "$work" -czf "$out/logs.tar.gz" logs 2>/dev/null; }
finish() {
  keep_logs
  echo "---- table"
  cat "$table"
  rm -rf "$work"
}
trap finish EXIT
trap 'echo "ended from outside" | tee -a "$table"; exit 1' TERM INT HUP

if [ -n "$carried" ] && [ -f "$carried" ]; then
  home=$work/carried
  mkdir "$home"
  tar -C "$home" -xzf "$carried" || { echo "$carried is not what collect.sh makes" >&2; exit 2; }
elif [ -n "$carried" ]; then
  home=$carried
else
  home=$root/build-gpu
  if cmake -S . -B build-gpu -DCAPSTAN_CUDA=ON >"$logs/build.log" 2>&1 && cmake --build build-gpu -j "$(nproc)" >>"$logs/build.log" 2>&1; then
    echo "built in $((SECONDS - part_begin)) s on $(nproc) cores" | tee -a "$table"
  else
    tail -40 "$logs/build.log"
    echo "the build failed" >>"$table"
    exit 1
  fi
fi
capstan=$home/bin/capstan
[ -x "$capstan" ] || { echo "there is no $capstan: expected a build with the CUDA part" | tee -a "$table" >&2; exit 2; }
plain_path=${LD_LIBRARY_PATH:-}
folders=
for name in libcublasLt.so.13 libcudnn.so.9 libnccl.so.2; do
  for place in $("$python" -c 'import site; print(*site.getsitepackages())' 2>/dev/null) $(python3 -c 'import site; print(*site.getsitepackages())' 2>/dev/null) \
    /usr/local/cuda/lib64 /usr/lib/x86_64-linux-gnu; do
    found=$(find -L "$place" -maxdepth 4 -name "$name" -printf '%h\n' 2>/dev/null | head -1)
    [ -n "$found" ] && { folders=$folders:$found; break; }
  done
  [ -n "$found" ] || echo "$name was not found under pip's folders, CUDA's or the system's: the loader must know it" | tee -a "$table"
done
export LD_LIBRARY_PATH=$home/lib$folders${plain_path:+:$plain_path} OMP_WAIT_POLICY=passive
# Python and other programs of this machine keep their own libraries: those that were carried may be older.
printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$plain_path" "$(command -v "$python" || echo "$python")" >"$work/python"
chmod +x "$work/python"

line() { printf '%-58s %s\n' "$1" "$2" | tee -a "$table"; }
# Seconds that are left of the whole and of this part.
left() {
  local whole=$((minutes * 60 - SECONDS)) part=$((590 - (SECONDS - part_begin)))
  echo $((whole < part ? whole : part))
}
# Seconds that a check may take, at most $1.
within() {
  local left
  left=$(left)
  [ "$left" -lt 1 ] && left=1
  echo $(($1 < left ? $1 : left))
}

# check NAME SECONDS COMMAND...: one line of the table; the log is kept. After SECONDS it has failed. True when it passed.
check() {
  local name=$1 seconds=$2 log begin=$SECONDS code
  shift 2
  [ "$(left)" -lt 1 ] && { line "$name" "not run: no time is left"; return 1; }
  log=$logs/$(echo "$part $name" | tr -c 'a-zA-Z0-9\n' _).log
  limited "$(within "$seconds")" "$@" >"$log" 2>&1
  code=$?
  if [ $code = 0 ]; then
    line "$name" "pass  $((SECONDS - begin)) s  $(tail -1 "$log" | cut -c1-150)"
  else
    line "$name" "FAIL  $((SECONDS - begin)) s$([ $code = 124 ] && echo ', out of time')"
    grep -aE 'FAILED|Error|error|\[[a-z_ ]+\]|element|over|ERROR SUMMARY' "$log" | head -30
    tail -3 "$log"
    failed=1
  fi
  return $code
}
# A program or one of the functions here, ended after the seconds.
limited() {
  local seconds=$1
  shift
  if [ "$(type -t "$1")" = function ]; then limit=$seconds "$@"; else timeout -k 10 "$seconds" "$@"; fi
}
# measure SECONDS COMMAND...: its output is part of the table; after SECONDS it has failed.
measure() {
  local seconds code
  [ "$(left)" -lt 1 ] && { line "${*:2}" "not run: no time is left"; return; }
  seconds=$(within "$1")
  shift
  timeout -k 10 "$seconds" "$@" 2>&1 | tee -a "$table"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { line "$*" "FAIL$([ "$code" = 124 ] && echo '  out of time')"; failed=1; }
}

train() { # RECIPE FOLDER DEVICE overrides...
  local recipe=$1 folder=$2 device=$3
  shift 3
  timeout -k 10 "${limit:-120}" "$capstan" train "tests/gpu/$recipe.yaml" "run.device=$device" "run.dir=$work/$folder" run.threads=8 "$@"
}
# Several ranks of this machine, started as torchrun would: no mpirun is needed.
ranks() { # COUNT RECIPE FOLDER overrides...
  local count=$1 recipe=$2 folder=$3 port=$((20000 + RANDOM % 20000)) jobs=() code=0 r
  shift 3
  for ((r = 0; r < count; ++r)); do
    RANK=$r LOCAL_RANK=$r WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count MASTER_ADDR=localhost MASTER_PORT=$port \
      timeout -k 10 "${limit:-120}" "$capstan" train "tests/gpu/$recipe.yaml" run.device=cuda "run.dir=$work/$folder" run.threads=2 "$@" &
    jobs+=($!)
  done
  for r in "${jobs[@]}"; do wait "$r" || code=1; done
  return $code
}
refused() { # TEXT COMMAND...: it must fail and say so
  local text=$1 said
  shift
  said=$("$@" 2>&1) && return 1
  echo "$said"
  echo "$said" | grep -q "$text"
}
compared() { # MODE A B
  "$work/python" tests/gpu/compare.py "$1" "$work/$2" "$work/$3"
}
sanitized() { # TOOL PROGRAM...: kernels of NVIDIA's own libraries are theirs
  local tool=$1
  shift
  timeout -k 10 "${limit:-300}" compute-sanitizer --tool "$tool" --kernel-name-exclude kernel_substring=nvjet --kernel-name-exclude kernel_substring=cudnn \
    --kernel-name-exclude kernel_substring=cutlass --error-exitcode 9 "$@"
}
has_sanitizer() {
  command -v compute-sanitizer >/dev/null && return 0
  line "$1" "not run: there is no compute-sanitizer"
  return 1
}

part_ops() {
  check "every op against f64, twice the same bits" 500 "$home/bin/gpu_ops" '--gtest_filter=*OpTest*:Gpu*.*' --gtest_brief=1
}

part_train() {
  local recipe type
  for recipe in gpt llama; do
    for type in f32 bf16; do
      check "train $recipe $type on the CPU" 120 train $recipe "$recipe-$type-cpu" cpu precision.compute=$type
      check "train $recipe $type on the GPU" 60 train $recipe "$recipe-$type-gpu" cuda precision.compute=$type
      check "  50 losses beside the CPU's" 20 compared near "$recipe-$type-cpu" "$recipe-$type-gpu"
      check "  again on the GPU" 60 train $recipe "$recipe-$type-again" cuda precision.compute=$type
      check "  the same bits" 20 compared same "$recipe-$type-gpu" "$recipe-$type-again"
    done
  done
}

steps_of() { # MODEL...
  local model words=()
  for model in "$@"; do words+=(--recipe "$home/share/capstan/bench/$model.yaml"); done
  if "$work/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>"$logs/pytorch.log"; then
    words+=(--python "$work/python")
  else
    line "PyTorch" "not run: $python has none that can use a GPU: $(tail -1 "$logs/pytorch.log" | cut -c1-100)"
    words+=(--no-pytorch)
  fi
  measure 590 "$capstan" bench gpu --part steps --seconds 140 "${words[@]}"
}
part_steps_gpt2() { steps_of gpt2_124m gpt2_1558m; }

part_graphs() {
  local recipe type graphs
  for recipe in gpt llama; do
    for type in f32 bf16; do
      for graphs in off on; do
        check "train $recipe $type, cuda_graphs $graphs" 60 train $recipe "graphs-$recipe-$type-$graphs" cuda precision.compute=$type run.cuda_graphs=$graphs
      done
      check "  the same bits" 20 compared same "graphs-$recipe-$type-off" "graphs-$recipe-$type-on"
    done
  done
  check "timed products" 90 train gpt tuned-1 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
  check "timed products, read" 60 train gpt tuned-2 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
  check "  the same bits" 20 compared same tuned-1 tuned-2
}

part_speed() {
  measure 300 "$capstan" bench gpu --part kernels --part products --part attention
  measure 150 "$home/bin/capstan_gpu_kernels" bench
  measure 100 "$capstan" bench "$home/share/capstan/bench/gpt2_124m.yaml" run.device=cuda --profile
}

part_ranks() {
  local gpus way n axis
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
  check "collectives and meshes, ranks as threads" 300 "$home/bin/gpu_ranks" --gtest_brief=1
  check "one rank" 60 train gpt ranks_one cuda
  for way in staged nccl; do
    for n in 2 4; do
      [ $way = nccl ] && [ "$gpus" -lt "$n" ] && { line "$n ranks over $way" "not run: it wants $n GPUs, here are $gpus"; continue; }
      for axis in shard tensor pp; do
        check "$n ranks along $axis over $way" 120 ranks "$n" gpt "$way-$axis-$n" "mesh.$axis=$n" mesh.gpu_communication=$way data.micro_batch=2
        check "  50 losses beside one rank's" 20 compared near ranks_one "$way-$axis-$n"
      done
    done
  done
}

part_train_fp8() {
  local recipe linear
  for recipe in gpt llama; do
    # mxfp8 where the chip has block scales: elsewhere the recipe must be refused.
    for linear in fp8 mxfp8; do
      if [ $linear = mxfp8 ] && [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | cut -d. -f1)" -lt 10 ]; then
        check "train $recipe mxfp8 is refused" 30 refused "need 10.0" train $recipe "$recipe-mxfp8-gpu" cuda precision.compute=bf16 precision.linear=mxfp8
        continue
      fi
      check "train $recipe $linear on the CPU" 120 train $recipe "$recipe-$linear-cpu" cpu precision.compute=bf16 precision.linear=$linear
      check "train $recipe $linear on the GPU" 60 train $recipe "$recipe-$linear-gpu" cuda precision.compute=bf16 precision.linear=$linear
      check "  50 losses beside the CPU's" 20 compared near "$recipe-$linear-cpu" "$recipe-$linear-gpu"
      check "  again on the GPU" 60 train $recipe "$recipe-$linear-again" cuda precision.compute=bf16 precision.linear=$linear
      check "  the same bits" 20 compared same "$recipe-$linear-gpu" "$recipe-$linear-again"
    done
  done
}

part_checkpoints() {
  local words=(train.steps=50 checkpoint.every_steps=30 schedule.decay=constant) both=0
  if check "checkpoint of the GPU, 30 steps" 60 train gpt across cuda "${words[@]}"; then
    rm -rf "$work/across/checkpoints/step_000050"* "$work/across/checkpoints/LATEST"
    check "  continued on the CPU" 120 train gpt across cpu "${words[@]}" && both=$((both + 1))
  fi
  if check "checkpoint of the CPU, 30 steps" 120 train gpt back cpu "${words[@]}"; then
    rm -rf "$work/back/checkpoints/step_000050"* "$work/back/checkpoints/LATEST"
    check "  continued on the GPU" 60 train gpt back cuda "${words[@]}" && both=$((both + 1))
  fi
  # A run that began anew on the other device would agree as well.
  if [ $both = 2 ]; then check "  both beside each other" 20 compared near across back; else line "  both beside each other" "not run: one of them failed"; fi
}

part_kernels() {
  check "kernels over odd shapes, poisoned, twice the same bits" 500 "$home/bin/capstan_gpu_kernels" test
}

part_steps_llama() { steps_of qwen2_5_0_5b qwen2_5_1_5b; }
part_steps_8b() { steps_of llama3_8b_8_layers; }

part_memcheck() {
  has_sanitizer "memcheck" || return
  check "kernels under memcheck" 280 sanitized memcheck "$home/bin/capstan_gpu_kernels" small
  check "ops under memcheck" 300 sanitized memcheck "$home/bin/gpu_ops" '--gtest_filter=Attention*:CrossEntropy*:Norm*:Embedding*:Reduce*:Gpu*.*' --gtest_brief=1
}

part_racecheck() {
  has_sanitizer "racecheck" || return
  check "kernels under racecheck" 550 sanitized racecheck "$home/bin/capstan_gpu_kernels" small
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | tee -a "$table"
for part in $parts; do
  part_begin=$SECONDS
  echo "== $part" | tee -a "$table"
  "part_$part"
  keep_logs
done
exit $failed
