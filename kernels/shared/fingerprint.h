// defines: fingerprint_of(): one element's part of a tensor's fingerprint, the same on CPU and GPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define CAPSTAN_HASH __host__ __device__ __forceinline__
#else
#define CAPSTAN_HASH inline
#endif

namespace capstan::kernels {

/// Finalizer of MurmurHash3 (Appleby 2011): every bit of x moves every bit of the result.
CAPSTAN_HASH std::uint64_t mix_bits(std::uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

CAPSTAN_HASH std::uint64_t fingerprint_of(std::uint64_t bits, std::uint64_t index) {
  return mix_bits(bits ^ mix_bits(index));
}

}  // namespace capstan::kernels
