#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: the ops' own tests with the GPU as the device, the kernels' tests, both
# under compute-sanitizer, training against the CPU, the same bits twice, checkpoints across devices, and every measurement,
# beside PyTorch's where that is installed. Ends with one table. Exit codes: 0 all passed, 1 something failed, 2 what was asked for
# cannot be, 3 nothing failed but something that was asked for did not run (the table says what and why).
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
[[ $minutes =~ ^[0-9]+$ ]] || { echo "--minutes '$minutes': expected a whole number" >&2; exit 2; }
minutes=$((10#$minutes))
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
missed=0
number=0
part_begin=$SECONDS
PATH=$PATH:/usr/local/cuda/bin  # compute-sanitizer is there
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
refuse() { echo "$1" | tee -a "$table" >&2; exit 2; }

# What collect.sh noted of the machine that built the bundle: this one needs as new a glibc and the same instructions.
fits() { # FILE
  local word value glibc missing
  while read -r word value; do
    case $word in
      glibc)
        glibc=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
        [ "$(printf '%s\n' "$value" "$glibc" | sort -V | tail -1)" = "$glibc" ] ||
          refuse "this bundle needs glibc $value, here is $glibc: build it on a system as old as this one" ;;
      instructions)
        missing=$(comm -23 <(tr ' ' '\n' <<<"$value" | sort) <(grep -m1 '^flags' /proc/cpuinfo | tr ' ' '\n' | sort) | tr '\n' ' ')
        [ -z "$missing" ] || refuse "this bundle was built for a processor that has ${missing% }, which this one has not: build it with -DCAPSTAN_NATIVE=OFF" ;;
    esac
  done <"$1"
}

if [ -n "$carried" ] && [ -f "$carried" ]; then
  home=$work/carried
  mkdir "$home"
  tar -C "$home" -xzf "$carried" || refuse "$carried is not what collect.sh makes"
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
[ -x "$capstan" ] || refuse "there is no $capstan: expected a build with the CUDA part"
[ -e "$home/share/capstan/built_on" ] && fits "$home/share/capstan/built_on"
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
not_run() { # NAME WHY
  line "$1" "not run: $2"
  missed=1
}
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

# By timeout's codes: it ended at the signal, or had to be killed.
out_of_time() { [ "$1" = 124 ] || [ "$1" = 137 ]; }

# check NAME SECONDS COMMAND...: one line of the table; the log is kept. After SECONDS it has failed. True when it passed.
check() {
  local name=$1 seconds=$2 log begin=$SECONDS code
  shift 2
  [ "$(left)" -lt 1 ] && { not_run "$name" "no time is left"; return 1; }
  log=$logs/$(printf '%03d' $((++number)))_$(echo "$part $name" | tr -c 'a-zA-Z0-9\n' _).log
  limited "$(within "$seconds")" "$@" >"$log" 2>&1
  code=$?
  if [ $code = 0 ]; then
    line "$name" "pass  $((SECONDS - begin)) s  $(telling "$log" | cut -c1-150)"
  else
    line "$name" "FAIL  $((SECONDS - begin)) s$(out_of_time $code && echo ', out of time')"
    grep -aE 'FAILED|Error|error|\[[a-z_ ]+\]|element|over|ERROR SUMMARY' "$log" | head -30
    tail -3 "$log"
    failed=1
  fi
  return $code
}
# What a log has to say in one line: how many tests passed and were skipped, or the last losses and counts.
telling() {
  local tests
  tests=$(grep -aE '^\[  (PASSED|SKIPPED)' "$1" | head -2 | tr -s ' []' ' ' | paste -sd,)
  if [ -n "$tests" ]; then echo "$tests"; else grep -aE '[0-9]' "$1" | grep -avE '^(try|done): ' | tail -1; fi
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
  [ "$(left)" -lt 1 ] && { not_run "${*:2}" "no time is left"; return; }
  seconds=$(within "$1")
  shift
  timeout -k 10 "$seconds" "$@" 2>&1 | tee -a "$table"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { line "$*" "FAIL$(out_of_time $code && echo '  out of time')"; failed=1; }
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
# Kernels of NVIDIA's own libraries are theirs. Calls that fail are the programs' own to see (each code is looked at): tests let
# memory run out.
sanitized() { # TOOL PROGRAM...
  local tool=$1 words=()
  shift
  [ "$tool" = memcheck ] && words=(--report-api-errors no)
  timeout -k 10 "${limit:-300}" compute-sanitizer --tool "$tool" "${words[@]}" --kernel-name-exclude kernel_substring=nvjet --kernel-name-exclude kernel_substring=cudnn \
    --kernel-name-exclude kernel_substring=cutlass --error-exitcode 9 "$@"
}
has_sanitizer() {
  command -v compute-sanitizer >/dev/null && return 0
  not_run "$1" "there is no compute-sanitizer in PATH or /usr/local/cuda/bin"
  return 1
}

part_ops() {
  check "every op against f64, twice the same bits" 500 "$home/bin/gpu_ops" --gtest_brief=1
}

part_train() {
  local recipe type
  for recipe in gpt llama; do
    for type in f32 bf16; do
      check "train $recipe $type on the CPU" 120 train $recipe "$recipe-$type-cpu" cpu precision.compute=$type
      check "train $recipe $type on the GPU" 60 train $recipe "$recipe-$type-gpu" cuda precision.compute=$type
      check "  $recipe $type: 50 losses beside the CPU's" 20 compared near "$recipe-$type-cpu" "$recipe-$type-gpu"
      check "  $recipe $type again on the GPU" 60 train $recipe "$recipe-$type-again" cuda precision.compute=$type
      check "  $recipe $type: the same bits" 20 compared same "$recipe-$type-gpu" "$recipe-$type-again"
    done
  done
  check "train gpt bf16, attention's sums in any order" 60 train gpt gpt-bf16-free cuda precision.compute=bf16 run.attention_backward=free
  check "  in any order: 50 losses beside the ordered ones" 20 compared near gpt-bf16-gpu gpt-bf16-free
}

# Ours, PyTorch's (whose compiler needs minutes for a deep model), then ours in fp8: together within a part.
steps_of() { # MODEL
  local words=(--recipe "$home/share/capstan/bench/$1.yaml")
  if "$work/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>"$logs/pytorch.log"; then
    words+=(--python "$work/python")
  else
    not_run "PyTorch" "$python has none that can use a GPU: $(tail -1 "$logs/pytorch.log" | cut -c1-100)"
    words+=(--no-pytorch)
  fi
  measure 590 "$capstan" bench gpu --part steps --seconds 125 --pytorch-seconds 280 "${words[@]}"
}
part_steps_gpt2() { steps_of gpt2_124m; }

writes() { # FOLDER FILE DEVICE overrides...: the likeliest 32 tokens after a prompt into FILE.greedy, a drawn text into FILE.drawn
  local file=$work/$2 words=(timeout -k 10 "${limit:-60}" "$capstan" generate "$work/$1" "run.device=$3" run.threads=8 "${@:4}")
  "${words[@]}" --prompt "#include <" --temperature 0 --max-tokens 32 >"$file.greedy" && "${words[@]}" --prompt "namespace " --seed 5 --max-tokens 64 >"$file.drawn"
}
texts_equal() { # KIND A B
  cmp "$work/$2.$1" "$work/$3.$1" && echo "$(wc -c <"$work/$2.$1") bytes, equal"
}
part_graphs() {
  local recipe type graphs
  check "queued and recorded steps, recorded decoding" 240 "$home/bin/gpu_graphs" --gtest_filter=-Products.* --gtest_brief=1
  for recipe in gpt llama; do
    for type in f32 bf16; do
      for graphs in off on; do
        check "train $recipe $type, cuda_graphs $graphs" 60 train $recipe "graphs-$recipe-$type-$graphs" cuda precision.compute=$type run.cuda_graphs=$graphs
      done
      check "  $recipe $type: the same bits" 20 compared same "graphs-$recipe-$type-off" "graphs-$recipe-$type-on"
    done
  done
  for graphs in off on; do check "generate, cuda_graphs $graphs" 60 writes graphs-llama-f32-on "text-$graphs" cuda inference.cuda_graphs=$graphs; done
  check "generate on the CPU" 60 writes graphs-llama-f32-on text-cpu cpu
  check "  the likeliest tokens, recorded and not" 10 texts_equal greedy text-off text-on
  check "  a drawn text, recorded and not" 10 texts_equal drawn text-off text-on
  check "  the likeliest tokens beside the CPU's" 10 texts_equal greedy text-cpu text-on
  check "timed products" 90 train gpt tuned-1 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
  check "timed products, read" 60 train gpt tuned-2 cuda precision.compute=bf16 run.gemm_choice=tuned "run.gemm_file=$work/products.txt"
  check "  timed products: the same bits" 20 compared same tuned-1 tuned-2
}

part_speed() {
  measure 300 "$capstan" bench gpu --part kernels --part products --part attention
  measure 150 "$home/bin/capstan_gpu_kernels" bench
  measure 100 "$capstan" bench "$home/share/capstan/bench/gpt2_124m.yaml" run.device=cuda --profile
}

part_ranks() {
  local gpus way n axis
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c '^[0-9]')
  check "collectives and meshes, ranks as threads" 300 "$home/bin/gpu_ranks" --gtest_brief=1
  check "one rank" 60 train gpt ranks_one cuda
  for way in staged nccl; do
    for n in 2 4; do
      [ $way = nccl ] && [ "$gpus" -lt "$n" ] && { not_run "$n ranks over $way" "it wants $n GPUs, here are $gpus"; continue; }
      for axis in shard tensor pp; do
        check "$n ranks along $axis over $way" 120 ranks "$n" gpt "$way-$axis-$n" "mesh.$axis=$n" mesh.gpu_communication=$way data.micro_batch=2
        check "  $n along $axis over $way: 50 losses beside one rank's" 20 compared near ranks_one "$way-$axis-$n"
      done
    done
  done
}

part_train_fp8() {
  local recipe linear capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | cut -d. -f1)
  for recipe in gpt llama; do
    # mxfp8 where the chip has block scales: elsewhere the recipe must be refused.
    for linear in fp8 mxfp8; do
      if [ $linear = mxfp8 ] && ! [[ $capability =~ ^[0-9]+$ ]]; then
        not_run "train $recipe mxfp8" "nvidia-smi does not say which compute capability this GPU has"
        continue
      fi
      if [ $linear = mxfp8 ] && [ "$capability" -lt 10 ]; then
        check "train $recipe mxfp8 is refused" 30 refused "need 10.0" train $recipe "$recipe-mxfp8-gpu" cuda precision.compute=bf16 precision.linear=mxfp8
        continue
      fi
      check "train $recipe $linear on the CPU" 120 train $recipe "$recipe-$linear-cpu" cpu precision.compute=bf16 precision.linear=$linear
      check "train $recipe $linear on the GPU" 60 train $recipe "$recipe-$linear-gpu" cuda precision.compute=bf16 precision.linear=$linear
      check "  $recipe $linear: 50 losses beside the CPU's" 20 compared near "$recipe-$linear-cpu" "$recipe-$linear-gpu"
      check "  $recipe $linear again on the GPU" 60 train $recipe "$recipe-$linear-again" cuda precision.compute=bf16 precision.linear=$linear
      check "  $recipe $linear: the same bits" 20 compared same "$recipe-$linear-gpu" "$recipe-$linear-again"
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
  if [ $both = 2 ]; then check "  both beside each other" 20 compared near across back; else not_run "  both beside each other" "one of them did not end well"; fi
}

part_kernels() {
  check "kernels over odd shapes, poisoned, twice the same bits" 500 "$home/bin/capstan_gpu_kernels" test
}

part_steps_gpt2_xl() { steps_of gpt2_1558m; }
part_steps_qwen() { steps_of qwen2_5_0_5b; }
part_steps_qwen_xl() { steps_of qwen2_5_1_5b; }
part_steps_8b() { steps_of llama3_8b_8_layers; }

# Every op under memcheck, and under racecheck, in two parts: what reads by rows, and the rest.
by_rows='Attention*:Of/AttentionWindow*:CrossEntropy*:Norm*:Embedding*:Softmax*'
large='Attention.HoldsNoMatrixOfAllPairs:CrossEntropyObjective.HoldsAChunkOfLogits:CrossEntropyObjective.ChunksMakeTheWhole'  # they take what checking cannot wait for
part_memcheck() {
  has_sanitizer "kernels under memcheck" && check "kernels under memcheck" 550 sanitized memcheck "$home/bin/capstan_gpu_kernels" small
}
part_memcheck_rows() {
  has_sanitizer "ops by rows under memcheck" && check "ops by rows under memcheck" 550 sanitized memcheck "$home/bin/gpu_ops" "--gtest_filter=$by_rows-$large" --gtest_brief=1
}
part_memcheck_ops() {
  has_sanitizer "other ops under memcheck" && check "other ops under memcheck" 550 sanitized memcheck "$home/bin/gpu_ops" "--gtest_filter=-$by_rows:$large" --gtest_brief=1
}

part_racecheck() {
  has_sanitizer "kernels under racecheck" && check "kernels under racecheck" 550 sanitized racecheck "$home/bin/capstan_gpu_kernels" small
}
part_racecheck_rows() {
  has_sanitizer "ops by rows under racecheck" && check "ops by rows under racecheck" 550 sanitized racecheck "$home/bin/gpu_ops" "--gtest_filter=$by_rows-$large" --gtest_brief=1
}
part_racecheck_ops() {
  has_sanitizer "other ops under racecheck" && check "other ops under racecheck" 550 sanitized racecheck "$home/bin/gpu_ops" "--gtest_filter=-$by_rows:$large" --gtest_brief=1
}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | tee -a "$table"
for part in $parts; do
  part_begin=$SECONDS
  echo "== $part" | tee -a "$table"
  "part_$part"
  keep_logs
done
[ $failed = 0 ] || exit 1
[ $missed = 0 ] || exit 3
