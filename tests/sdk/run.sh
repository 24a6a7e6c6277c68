#!/usr/bin/env bash
# Installs a build to a temporary prefix, moves the prefix away, builds plugins against it out of the tree (my_model/ beside
# this script, and what `capstan plugin new` writes for each kind), and trains with them by the installed program.
#   run.sh CMAKE BUILD_FOLDER GENERATOR COMPILER COMPILER_FLAGS
set -euo pipefail
cmake=$1 build=$2 generator=$3 compiler=$4 flags=$5
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n== %s\n' "$*"; }
die() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

step "install, then move the prefix: nothing may remember where it was"
"$cmake" --install "$build" --prefix "$work/first" > "$work/install.log" || { cat "$work/install.log"; die "install"; }
mv "$work/first" "$work/prefix"
prefix=$work/prefix
for file in "$prefix"/bin/capstan "$prefix"/lib/libcapstan.so "$prefix"/lib/capstan/plugins/*.so; do
  if readelf -d "$file" | grep -E 'R(UN)?PATH' | grep -F -e "$build" -e "$work"; then die "$file remembers a folder"; fi
done
if grep -rlF -e "$build" -e "$work" "$prefix"/{lib/cmake,include,share}; then die "the package remembers a folder"; fi

# From here on only the installed program, from another folder and with a bare environment.
cd "$work"
capstan() { env -i PATH=/usr/bin:/bin HOME="$work" "$prefix/bin/capstan" "$@"; }
build_plugin() {  # folder, where the package is
  "$cmake" -S "$1" -B "$1/build" -G "$generator" -DCapstan_DIR="$2" -DCMAKE_CXX_COMPILER="$compiler" \
    -DCMAKE_CXX_FLAGS="$flags" > "$1.log" 2>&1 && "$cmake" --build "$1/build" --parallel 2 >> "$1.log" 2>&1 ||
    { cat "$1.log"; die "building $1"; }
}

step "the installed program runs and knows its plugins"
capstan --version
capstan plugin list
capstan plugin list | grep -q "^model .* $prefix/lib/capstan/plugins/model_gpt.so$" || die "gpt is not listed"
if capstan plugin list | grep refused; then die "a plugin of the prefix is refused"; fi

step "a model written with public headers only"
cp -r "$here/my_model" my_model
build_plugin my_model "$prefix/lib/cmake/Capstan"
library=my_model/build/model_my_model.so
exports=$(nm -D --defined-only "$library" | awk '{ print $3 }' | sort | xargs)
[[ $exports == "capstan_plugin_info capstan_plugin_register" ]] || die "$library exports: $exports"
capstan plugin info "$library"
capstan train my_model/recipe.yaml run.dir="$work/run"
# Mean loss of the first and of the last five steps.
awk -F'"loss":' '/"loss":/ { split($2, rest, /[,}]/); loss[++n] = rest[1] }
  END { for (i = 1; i <= 5; ++i) { first += loss[i] / 5; last += loss[n + 1 - i] / 5 }
        printf "%d steps, loss %.3f -> %.3f\n", n, first, last
        exit !(n >= 40 && last < 0.75 * first) }' run/metrics.jsonl || die "the loss did not fall"

step "the trained model writes text through the installed engine"
capstan generate run --prompt "const " --max-tokens 40 > text
cat text
(($(wc -c < text) > 10)) || die "it wrote $(wc -c < text) bytes"

step "a plugin that is not there, by the installed program: exit code 2 and a message that helps"
code=0
capstan train my_model/recipe.yaml run.dir="$work/none" model.plugin=my_modle 2> message || code=$?
[[ $code == 2 ]] || die "expected exit code 2, got $code"
grep -F "there is no model plugin 'my_modle'" message || { cat message; die "the message"; }

kinds=()
# Every kind that the program offers has a start.
for kind in $(capstan plugin new --help | sed -n 's/.*{\(.*\)}.*/\1/p' | tr ',' ' '); do
  step "what \`capstan plugin new --kind $kind\` writes"
  capstan plugin new "new_$kind" --kind "$kind"
  build_plugin "new_$kind" "$prefix/lib/cmake/Capstan"
  capstan plugin info "new_$kind/build/${kind}_new_$kind.so"
  capstan train "new_$kind/recipe.yaml" run.dir="$work/run_$kind" train.steps=3
  kinds+=("$kind")
done
[[ $(printf '%s\n' "${kinds[@]}" | sort | xargs) == "checkpoint inference layer model optimizer tokenizer" ]] || die "kinds: ${kinds[*]}"

step "the checkpoint format of the template: verified, resumed, refused when cut short; it reads back what HDF5 reads back"
folder=run_checkpoint/checkpoints/step_000003
head -n 5 "$folder"/shard*.new_checkpoint | cut -c 1-100
[[ -s $folder/index.new_checkpoint ]] || die "no index"
capstan checkpoint verify run_checkpoint
capstan train new_checkpoint/recipe.yaml run.dir="$work/run_hdf5" train.steps=3 checkpoint.format=hdf5 > /dev/null
for run in run_checkpoint run_hdf5; do capstan generate "$run" --prompt "int " --max-tokens 20 > "$run.text"; done
cmp run_checkpoint.text run_hdf5.text || die "weights differ after reading"
capstan train new_checkpoint/recipe.yaml run.dir="$work/run_checkpoint" train.steps=5 > resumed 2>&1 || { cat resumed; die "resuming"; }
grep '"step":5' run_checkpoint/metrics.jsonl > /dev/null || die "it did not go on to step 5"
rm -r run_checkpoint/checkpoints/step_000005
truncate -s -1 "$folder"/shard*.new_checkpoint
if capstan generate run_checkpoint --prompt "int " > damaged 2>&1; then die "a shard that was cut short was read"; fi
grep -F "is cut short" damaged | grep "lost: " || { cat damaged; die "the message"; }  # core knows: the format said where each tensor lies

step "the inference engine of the template: the likeliest tokens are those of the basic engine, which keeps its past"
for engine in "$work/new_inference/build/inference_new_inference.so" basic; do
  capstan generate run_inference inference="$engine" --prompt "class " --temperature 0 --max-tokens 40 > "text_$(basename "$engine")"
  capstan generate run_inference inference="$engine" --prompt "class " --seed 3 --max-tokens 40 > "warm_$(basename "$engine")"
done
cmp text_inference_new_inference.so text_basic || die "texts differ"
if cmp -s text_basic warm_inference_new_inference.so; then die "sampling at temperature 0.8 chose the likeliest tokens throughout"; fi
capstan train new_inference/recipe.yaml run.dir="$work/run_samples" train.steps=2 train.sample_every=1 train.sample_tokens=8 > /dev/null
[[ -e run_samples/samples/step_000002.txt ]] || die "no sample"

step "the build folder serves as a package too"
cp -r new_tokenizer from_build
rm -rf from_build/build
build_plugin from_build "$build/lib/cmake/Capstan"
capstan plugin info from_build/build/tokenizer_new_tokenizer.so
printf '\nall good\n'
