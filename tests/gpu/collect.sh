#!/usr/bin/env bash
# Puts a CUDA build and the libraries it needs (not CUDA's own) into one file that tests/gpu/run.sh --carried takes on another machine:
#   tests/gpu/collect.sh BUILD_FOLDER [TARGET_FOLDER=.gpu]
# makes TARGET_FOLDER/bundle.tar.gz, at most 64 MiB, after it has seen that every program finds all of its libraries in it. What the
# other machine must have (glibc, and for a build with CAPSTAN_NATIVE this processor's instructions) is in share/capstan/built_on.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: tests/gpu/collect.sh BUILD_FOLDER [TARGET_FOLDER=.gpu]" >&2; exit 2; }
build=$(realpath -e "$1")
target=${2:-.gpu}
most=$((64 << 20))
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$target" "$tree/bin" "$tree/lib/capstan/plugins" "$tree/share/capstan"
needed=("$build"/bin/{capstan,gpu_ops,gpu_ranks,gpu_graphs,capstan_gpu_kernels} "$build"/lib/{libcapstan.so.0,libcapstan_cuda.so})
for file in "${needed[@]}"; do
  [ -e "$file" ] || { echo "there is no $file: build it first (cmake -DCAPSTAN_CUDA=ON, then these targets)" >&2; exit 1; }
done
cp "${needed[@]:0:5}" "$tree/bin/"
cp -L "${needed[@]:5}" "$tree/lib/"
if [ -e "$build/lib/libcapstan_nccl.so" ]; then cp -L "$build/lib/libcapstan_nccl.so" "$tree/lib/"; else echo "without NCCL: this build has no libcapstan_nccl.so"; fi
cp -L "$build"/lib/capstan/plugins/*.so "$tree/lib/capstan/plugins/"
cp -rL "$build/share/capstan/bench" "$tree/share/capstan/"
ours=("$tree"/bin/* "$tree"/lib/*.so* "$tree"/lib/capstan/plugins/*.so)
strip --strip-unneeded "${ours[@]}"

# Of every machine (glibc's), or of the machine with the GPU.
elsewhere='^(libc|libm|libdl|libpthread|librt|libresolv|libutil|libnsl|libanl)\.so|^ld-linux|^libcublas|^libcudnn|^libnccl|^libnvrtc'
for file in "${ours[@]}"; do
  LD_LIBRARY_PATH=$tree/lib ldd "$file" | awk '$3 ~ /^\// {print $3}'
done | sort -u | while read -r library; do
  name=$(basename "$library")
  if ! [[ $name =~ $elsewhere ]] && ! [ -e "$tree/lib/$name" ]; then cp -L "$library" "$tree/lib/"; fi
done
missing=$(for file in "$tree"/bin/* "$tree"/lib/*.so* "$tree"/lib/capstan/plugins/*.so; do
  LD_LIBRARY_PATH=$tree/lib ldd "$file" | awk -v lib="$tree/lib/" '$2 == "=>" && index($3, lib) != 1 {print $1}'
done | sort -u | grep -Ev "$elsewhere" || true)
[ -z "$missing" ] || { echo "these libraries would not be found on another machine: $missing" >&2; exit 1; }

# Symbols say which glibc they want. An instruction that is not there would end a program without a word: those that a compiler uses
# unasked (not sse4a, which AMD alone has).
{
  echo "glibc $(objdump -T "$tree"/bin/* "$tree"/lib/*.so* "$tree"/lib/capstan/plugins/*.so 2>/dev/null | grep -oE 'GLIBC_[0-9.]+' | cut -d_ -f2 | sort -Vu | tail -1)"
  if grep -q '^CAPSTAN_NATIVE:BOOL=ON' "$build/CMakeCache.txt"; then
    echo "instructions $(grep -m1 '^flags' /proc/cpuinfo | tr ' ' '\n' | grep -E '^(ssse3|sse4_[12]|avx.*|fma|f16c|bmi[12]|abm|movbe)$' | paste -sd' ')"
  fi
} >"$tree/share/capstan/built_on"

tar -C "$tree" -czf "$target/bundle.tar.gz" .
bytes=$(stat -c %s "$target/bundle.tar.gz")
echo "$target/bundle.tar.gz: $((bytes >> 20)) MiB of $(du -sm "$tree" | cut -f1) MiB"
[ "$bytes" -le $most ] || { echo "that is more than $((most >> 20)) MiB" >&2; exit 1; }
