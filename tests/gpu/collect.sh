#!/usr/bin/env bash
# Puts a CUDA build and the libraries it needs (not CUDA's own) into one folder that runs on another machine:
#   tests/gpu/collect.sh BUILD_FOLDER [TARGET_FOLDER=.gpu]
set -euo pipefail
build=$(realpath "$1")
target=${2:-.gpu}
rm -rf "$target"
mkdir -p "$target/bin" "$target/lib/capstan/plugins"
for program in capstan gpu_ops gpu_ranks capstan_gpu_kernels; do
  [ -e "$build/bin/$program" ] && cp "$build/bin/$program" "$target/bin/"
done
cp -L "$build"/lib/libcapstan.so.0 "$build"/lib/libcapstan_cuda.so "$target/lib/"
[ -e "$build/lib/libcapstan_nccl.so" ] && cp -L "$build/lib/libcapstan_nccl.so" "$target/lib/"
cp -L "$build"/lib/capstan/plugins/*.so "$target/lib/capstan/plugins/"
mkdir -p "$target/share/capstan" && cp -rL "$build/share/capstan/bench" "$target/share/capstan/"
strip --strip-unneeded "$target"/bin/* "$target"/lib/*.so* "$target"/lib/capstan/plugins/*.so
for file in "$target"/bin/* "$target"/lib/*.so* "$target"/lib/capstan/plugins/*.so; do
  LD_LIBRARY_PATH=$target/lib ldd "$file" | awk '$3 ~ /^\// {print $3}'
done | sort -u | while read -r library; do
  case $(basename "$library") in
    libc.so.*|libm.so.*|libdl.so.*|libpthread.so.*|librt.so.*|ld-linux*|libcublas*|libcudnn*|libnccl*|libnvrtc*|libcapstan*) ;;
    *) cp -Ln "$library" "$target/lib/" ;;
  esac
done
du -sh "$target"
