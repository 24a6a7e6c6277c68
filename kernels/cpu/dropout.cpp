// Dropout. Eight Philox blocks run side by side; each gives four neighbours of a row.
#include <capstan/kernels/philox.h>
#include <kernels/cpu/dropout.h>
#include <kernels/cpu/rows.h>

#include <cmath>

namespace capstan::kernels::cpu {

namespace {

using detail::U64x8;

// The product of the lower halves of the lanes; upper halves of x are zero.
CAPSTAN_INLINE U64x8 multiply32(U64x8 x, std::uint32_t by) {
#if defined(CAPSTAN_AVX512)
  return reinterpret_cast<U64x8>(_mm512_maskz_mul_epu32(detail::all8, reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(U64x8{} + std::uint64_t{by})));
#elif defined(__AVX2__)
  const __m256i y = _mm256_set1_epi64x(by);
  return {reinterpret_cast<detail::U64x4>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x.lo), y)),
          reinterpret_cast<detail::U64x4>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x.hi), y))};
#else
  return x * std::uint64_t{by};
#endif
}

// Keeps where the number reaches the threshold.
template <class C>
CAPSTAN_INLINE Vec<C> kept(Vec<C> x, const std::uint32_t* bits, std::uint32_t threshold, Vec<C> by) {
  if constexpr (std::is_same_v<C, float>) {
    return Vec<float>(detail::choose(detail::load_lanes<detail::U32x16>(bits) >= threshold, (x * by).v, detail::F32x16{}));
  } else {
    double r[8];
    for (int i = 0; i < 8; ++i) r[i] = bits[i] >= threshold ? x.v[i] * by.v[i] : 0.0;
    return Vec<double>::load(r);
  }
}

}  // namespace

void philox_32(std::uint64_t key, std::uint64_t step, std::uint64_t block, std::uint32_t* out) {
  constexpr std::uint64_t low = 0xffffffffull;
  const std::uint64_t neighbours[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  const U64x8 counter = detail::load_lanes<U64x8>(neighbours) + block;
  U64x8 c0 = counter & low, c1 = counter >> 32, c2 = U64x8{} + (step & low), c3 = U64x8{} + (step >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const U64x8 a = multiply32(c0, 0xD2511F53u), b = multiply32(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ std::uint64_t{k0};
    c2 = (a >> 32) ^ c3 ^ std::uint64_t{k1};
    c1 = b & low, c3 = a & low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const U64x8 front = c0 | (c1 << 32), back = c2 | (c3 << 32);  // numbers 0, 1 and 2, 3 of each block
#if defined(CAPSTAN_AVX512)
  const U64x8 first = __builtin_shuffle(front, back, U64x8{0, 8, 1, 9, 2, 10, 3, 11});
  const U64x8 second = __builtin_shuffle(front, back, U64x8{4, 12, 5, 13, 6, 14, 7, 15});
#else
  using detail::U64x4;
  const U64x8 first{__builtin_shuffle(front.lo, back.lo, U64x4{0, 4, 1, 5}), __builtin_shuffle(front.lo, back.lo, U64x4{2, 6, 3, 7})};
  const U64x8 second{__builtin_shuffle(front.hi, back.hi, U64x4{0, 4, 1, 5}), __builtin_shuffle(front.hi, back.hi, U64x4{2, 6, 3, 7})};
#endif
  detail::store_lanes(out, first);
  detail::store_lanes(out + 16, second);
}

template <class T>
void dropout(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, const std::int64_t* sample_ids, double p,
             std::uint64_t key, std::uint64_t step, T* y_all) {
  using C = Compute<T>;
  using V = Vec<C>;
  // (bits + 0.5) 2^-32 >= p, as integers.
  const std::uint32_t threshold = static_cast<std::uint32_t>(std::ceil(std::ldexp(p, 32) - 0.5));
  const C scale = static_cast<C>(1.0 / (1.0 - p));
  parallel_ranges(ctx, rows, row_grain(cols * 2), [=](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t chunk = 256;
    alignas(64) std::uint32_t bits[chunk + 64] = {};
    const V by(scale);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::uint64_t base = static_cast<std::uint64_t>(sample_ids[r]) * static_cast<std::uint64_t>(cols);
      for (std::int64_t c = 0; c < cols; c += chunk) {
        const std::int64_t n = cols - c < chunk ? cols - c : chunk;
        const std::uint64_t index = base + static_cast<std::uint64_t>(c);
        const std::int64_t skip = static_cast<std::int64_t>(index & 3);
        for (std::int64_t i = 0; i < n + skip; i += 32)
          philox_32(key, step, (index >> 2) + static_cast<std::uint64_t>(i) / 4, bits + i);
        const T* x = x_all + r * cols + c;
        T* y = y_all + r * cols + c;
        const std::uint32_t* b = bits + skip;
        for_blocks<C>(n, [=](std::int64_t i, auto m) { kept(V::load(x + i, m), b + i, threshold, by).store(y + i, m); });
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                              \
  template void dropout(Context&, std::int64_t, std::int64_t, const T*, const std::int64_t*, double, std::uint64_t, \
                        std::uint64_t, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
