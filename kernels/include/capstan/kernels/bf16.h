// defines: bf16, the 16-bit brain float, with round-to-nearest-even conversion. Host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CAPSTAN_HD __host__ __device__
#else
#define CAPSTAN_HD
#endif

namespace capstan::kernels {

struct bf16 {
  std::uint16_t bits = 0;
  bf16() = default;
  CAPSTAN_HD explicit bf16(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) bits = static_cast<std::uint16_t>((u >> 16) | 0x40u);  // quiet NaN
    else bits = static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  CAPSTAN_HD operator float() const {
    const std::uint32_t u = static_cast<std::uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};
static_assert(sizeof(bf16) == 2);

}  // namespace capstan::kernels
