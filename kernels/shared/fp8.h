// defines: fp8 numbers: conversions of e4m3 and e5m2 (Micikevicius et al. 2022), power-of-two scales in e8m0, and where a
// quantized matrix and its scales lie in memory. Host and device: one code for both, bit for bit.
//
// A scale covers a group of numbers: a whole matrix (Scaling::tensor), or 32 neighbours along what a product sums over
// (Scaling::block, the MXFP8 of OCP's Microscaling Formats 1.0). It is the smallest power of two that brings the group's
// largest magnitude within the format, so that nothing saturates (Mishra et al. 2025; the specification's own example
// rounds the exponent down and clips up to an eighth) and scaling itself never rounds. A group of zeros has the scale 1; one
// with an infinity or a NaN has the scale NaN and nothing but NaN in it: the product shows what was wrong with it.
#pragma once
#include <kernels/types.h>

#include <cstdint>
#include <cstring>

namespace capstan::kernels {

/// Bits of a format that keeps NaN and saturates: e4m3 has no infinity, that of e5m2 is never made.
struct E4M3 {
  static constexpr int mantissa = 3, bias = 7, top = 8;
  static constexpr std::uint32_t largest = 0x7e;
};
struct E5M2 {
  static constexpr int mantissa = 2, bias = 15, top = 15;
  static constexpr std::uint32_t largest = 0x7b;
};

CAPSTAN_HD inline std::uint32_t bits_of(float f) {
  std::uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
CAPSTAN_HD inline float float_of(std::uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

/// f in the format F: to nearest, ties to even; what is too large becomes the largest number, NaN is 0x7f.
template <class F>
CAPSTAN_HD inline std::uint8_t to_fp8(float f) {
  constexpr int drop = 23 - F::mantissa;
  constexpr std::uint32_t largest =
      ((F::largest >> F::mantissa) + 127 - F::bias) << 23 | (F::largest & ((1u << F::mantissa) - 1)) << drop;
  constexpr std::uint32_t least_normal = static_cast<std::uint32_t>(128 - F::bias) << 23;
  // Below the normal numbers: adding this number leaves the sum's last bit worth one subnormal step.
  constexpr std::uint32_t step = static_cast<std::uint32_t>(127 + 1 - F::bias - F::mantissa + 23) << 23;
  const std::uint32_t u = bits_of(f), sign = u >> 24 & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  const std::uint32_t a = magnitude < largest ? magnitude : largest;
  std::uint32_t code;
  if (a < least_normal)
    code = bits_of(float_of(a) + float_of(step)) - step;
  else
    code = ((a + ((1u << (drop - 1)) - 1) + (a >> drop & 1u)) >> drop) -
           (static_cast<std::uint32_t>(127 - F::bias) << F::mantissa);
  return static_cast<std::uint8_t>(sign | code);
}

/// Its value, exactly; every format's infinities and NaNs included.
template <class F>
CAPSTAN_HD inline float from_fp8(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24, magnitude = code & 0x7fu;
  const bool nan = F::mantissa == 3 ? magnitude == 0x7fu : magnitude > 0x7cu;
  if (nan) return float_of(sign | 0x7fc00000u);
  if (F::mantissa == 2 && magnitude == 0x7cu) return float_of(sign | 0x7f800000u);
  constexpr std::uint32_t least_normal = 1u << F::mantissa;
  if (magnitude < least_normal) {
    const float value =
        static_cast<float>(magnitude) * float_of(static_cast<std::uint32_t>(127 + 1 - F::bias - F::mantissa) << 23);
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude << (23 - F::mantissa)) + (static_cast<std::uint32_t>(127 - F::bias) << 23)));
}

/// 2^(code - 127); 255 is NaN.
CAPSTAN_HD inline float e8m0_value(std::uint32_t code) {
  return float_of(code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : code << 23);
}
/// 1 / e8m0_value(code), for codes up to 254.
CAPSTAN_HD inline float e8m0_inverse(std::uint32_t code) {
  return code == 255 ? float_of(0x7fc00000u) : e8m0_value(254 - code);
}

/// The e8m0 scale of a group whose largest magnitude has the bits `amax` (as an integer without sign: so infinities are
/// above all numbers and NaNs above them).
template <class F>
CAPSTAN_HD inline std::uint32_t scale_code(std::uint32_t amax) {
  static_assert((F::largest & ((1u << F::mantissa) - 1)) ==
                (F::mantissa == 3 ? 6u : 3u));  // both formats end at 1.75 * 2^top
  if (amax >= 0x7f800000u) return 255;
  if (amax == 0) return 127;
  const auto code = static_cast<std::int32_t>((amax >> 23) + ((amax & 0x7fffffu) > 0x600000u ? 1 : 0)) - F::top;
  return code < 0 ? 0 : static_cast<std::uint32_t>(code);
}

/// Numbers that share a scale under Scaling::block.
inline constexpr std::int64_t fp8_block = 32;
/// What the length of a product's sum is a multiple of; the columns of its result are one of 16.
CAPSTAN_HD constexpr std::int64_t fp8_multiple(Scaling scaling) { return scaling == Scaling::block ? fp8_block : 16; }
/// Rows of a turned matrix are padded to that with zeros.
CAPSTAN_HD constexpr std::int64_t fp8_padded(Scaling scaling, std::int64_t k) {
  return (k + fp8_multiple(scaling) - 1) / fp8_multiple(scaling) * fp8_multiple(scaling);
}

/// Where the scale of block `block` of row `row` lies among those of a matrix with `blocks` of them a row, as cuBLASLt's
/// VEC32_UE8M0 wants them: tiles of 128 rows by 4 blocks, in a tile row r at (r % 32) * 16 + (r / 32) * 4.
CAPSTAN_HD constexpr std::int64_t block_scale_at(std::int64_t row, std::int64_t block, std::int64_t blocks) {
  const std::int64_t tile = row / 128 * ((blocks + 3) / 4) + block / 4, r = row % 128;
  return tile * 512 + r % 32 * 16 + r / 32 * 4 + block % 4;
}
/// Bytes of the scales of a matrix [rows, k]: whole tiles; or two f32, the scale and the kernels' own note of the largest.
CAPSTAN_HD constexpr std::int64_t scale_bytes(Scaling scaling, std::int64_t rows, std::int64_t k) {
  return scaling == Scaling::tensor ? 8 : (rows + 127) / 128 * ((k / fp8_block + 3) / 4) * 512;
}

/// A matrix [rows, cols] and its transpose in one run of bytes: offsets, -1 for what is not there. The transpose has rows of
/// fp8_padded(rows); under Scaling::tensor both have the one scale.
struct Fp8Places {
  std::int64_t data = -1, scale = -1, turned = -1, turned_scale = -1, bytes = 0;
};
constexpr Fp8Places fp8_places(Scaling scaling, std::int64_t rows, std::int64_t cols, bool straight, bool turned) {
  Fp8Places p;
  const auto place = [&p](std::int64_t bytes) {
    const std::int64_t at = p.bytes;
    p.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  const std::int64_t padded = fp8_padded(scaling, rows);
  if (straight) p.data = place(rows * cols);
  if (straight || scaling == Scaling::tensor) p.scale = place(scale_bytes(scaling, rows, cols));
  if (turned) p.turned = place(cols * padded);
  if (turned) p.turned_scale = scaling == Scaling::tensor ? p.scale : place(scale_bytes(scaling, cols, padded));
  return p;
}

}  // namespace capstan::kernels
