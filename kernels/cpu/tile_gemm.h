// defines: tile_gemm(): a small product of register tiles, for attention's 64 x 64 blocks and for invariant products.
#pragma once
#include <kernels/cpu/simd.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace capstan::kernels::cpu {

/// f(0), f(1), ... f(N - 1) as constants: what they index in an array then stays in registers.
#define CAPSTAN_LAMBDA __attribute__((always_inline))
template <int N, class F> CAPSTAN_INLINE void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) CAPSTAN_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

/// C[r, v * lanes] (+)= sum_k A(r, k) B[k, v * lanes], R rows and NV vectors in registers. Each element's sum
/// runs over k > 0 in order by fma, so it does not depend on R or NV.
template <class A, int R, int NV>
CAPSTAN_INLINE void tile_kernel(std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b, std::int64_t ldb,
                                A* c, std::int64_t ldc, bool accumulate) {
  using V = Vec<A>;
  V acc[R][NV];
  each<R>([&](auto r) CAPSTAN_LAMBDA {
    each<NV>([&](auto v) CAPSTAN_LAMBDA { acc[r][v] = accumulate ? V::load(c + r * ldc + v * V::lanes) : V(A(0)); });
  });
  std::int64_t p = 0;
  do {  // k > 0: a loop that might not run would bring the sums by way of the stack
    V row[NV];
    each<NV>([&](auto v) CAPSTAN_LAMBDA { row[v] = V::load(b + p * ldb + v * V::lanes); });
    each<R>([&](auto r) CAPSTAN_LAMBDA {
      const V x(a[r * a_row + p * a_col]);
      each<NV>([&](auto v) CAPSTAN_LAMBDA { acc[r][v] = fma(x, row[v], acc[r][v]); });
    });
  } while (++p < k);
  each<R>([&](auto r) CAPSTAN_LAMBDA { each<NV>([&](auto v) CAPSTAN_LAMBDA { acc[r][v].store(c + r * ldc + v * V::lanes); }); });
}

template <class A, int NV>
void tile_rows(std::int64_t m, std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b, std::int64_t ldb,
               A* c, std::int64_t ldc, bool accumulate) {
  // As many rows as leave the accumulators in registers: 32 of them with AVX-512, 16 half as wide without.
#if defined(CAPSTAN_AVX512)
  constexpr int R = NV >= 4 ? 6 : 8;
#else
  constexpr int R = 6;
#endif
  std::int64_t r = 0;
  for (; r + R <= m; r += R) tile_kernel<A, R, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  for (; r + 4 <= m; r += 4) tile_kernel<A, 4, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  for (; r + 2 <= m; r += 2) tile_kernel<A, 2, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  for (; r < m; ++r) tile_kernel<A, 1, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
}

/// C[m, n] (+)= A B with n a multiple of the lanes (pad B and C). A is read at a[i * a_row + k * a_col].
template <class A>
void tile_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b,
               std::int64_t ldb, A* c, std::int64_t ldc, bool accumulate) {
  constexpr std::int64_t lanes = Vec<A>::lanes;
  if (k <= 0) {
    for (std::int64_t i = 0; i < m && !accumulate; ++i) std::fill_n(c + i * ldc, n, A(0));
    return;
  }
  std::int64_t j = 0;
#if defined(CAPSTAN_AVX512)
  for (; j + 4 * lanes <= n; j += 4 * lanes) tile_rows<A, 4>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  for (; j + 2 * lanes <= n; j += 2 * lanes) tile_rows<A, 2>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
#endif
  for (; j < n; j += lanes) tile_rows<A, 1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
}

/// Asks for a row ahead of its use: rows of one head lie kilobytes apart, where the hardware does not look ahead.
template <class T>
CAPSTAN_INLINE void prefetch_row(const T* row, std::int64_t cols) {
  for (std::int64_t c = 0; c < cols; c += static_cast<std::int64_t>(64 / sizeof(T))) __builtin_prefetch(row + c);
}

inline constexpr std::int64_t prefetch_distance = 12;  // rows

/// Copies rows x cols of a strided T matrix into a padded A matrix; columns up to `padded` are zero.
template <class A, class T>
void load_tile(std::int64_t rows, std::int64_t cols, std::int64_t padded, const T* from, std::int64_t stride, A* to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (r + prefetch_distance < rows) prefetch_row(from + (r + prefetch_distance) * stride, cols);
    for_blocks<A>(cols, [&](std::int64_t c, auto m) { Vec<A>::load(from + r * stride + c, m).store(to + r * padded + c, m); });
    for (std::int64_t c = cols; c < padded; ++c) to[r * padded + c] = A(0);
  }
}

#if defined(CAPSTAN_AVX512)
/// Rows of 16 become columns: r[i][j] <-> r[j][i], in 64 shuffles.
CAPSTAN_INLINE void transpose_in_registers(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_maskz_unpacklo_ps(detail::all16, r[i], r[i + 1]), b = _mm512_maskz_unpackhi_ps(detail::all16, r[i], r[i + 1]);
    const __m512 c = _mm512_maskz_unpacklo_ps(detail::all16, r[i + 2], r[i + 3]), d = _mm512_maskz_unpackhi_ps(detail::all16, r[i + 2], r[i + 3]);
    t[i] = _mm512_maskz_shuffle_ps(detail::all16, a, c, 0x44), t[i + 1] = _mm512_maskz_shuffle_ps(detail::all16, a, c, 0xee);
    t[i + 2] = _mm512_maskz_shuffle_ps(detail::all16, b, d, 0x44), t[i + 3] = _mm512_maskz_shuffle_ps(detail::all16, b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // quarters: t[4 q + i] holds column i of each quarter for rows 4 q .. 4 q + 3
    const __m512 a = _mm512_maskz_shuffle_f32x4(detail::all16, t[i], t[4 + i], 0x88), b = _mm512_maskz_shuffle_f32x4(detail::all16, t[8 + i], t[12 + i], 0x88);
    const __m512 c = _mm512_maskz_shuffle_f32x4(detail::all16, t[i], t[4 + i], 0xdd), d = _mm512_maskz_shuffle_f32x4(detail::all16, t[8 + i], t[12 + i], 0xdd);
    r[i] = _mm512_maskz_shuffle_f32x4(detail::all16, a, b, 0x88), r[8 + i] = _mm512_maskz_shuffle_f32x4(detail::all16, a, b, 0xdd);
    r[4 + i] = _mm512_maskz_shuffle_f32x4(detail::all16, c, d, 0x88), r[12 + i] = _mm512_maskz_shuffle_f32x4(detail::all16, c, d, 0xdd);
  }
}
#endif

#if defined(__AVX2__)
/// Rows of 8 become columns: r[i][j] <-> r[j][i], in 24 shuffles.
CAPSTAN_INLINE void transpose_in_registers(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) r[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20), r[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
}
#endif

/// The same, transposed: to[c * padded + r] = from[r, c]; rows up to `padded` are zero.
template <class A, class T>
void load_tile_transposed(std::int64_t rows, std::int64_t cols, std::int64_t padded, const T* from, std::int64_t stride, A* to) {
  std::int64_t r = 0;
#if defined(CAPSTAN_AVX512)
  if constexpr (std::is_same_v<A, float>)
    for (; r + 16 <= rows; r += 16) {
      const bool wide = cols > 128;  // then within these rows, not the next ones whole
      if (!wide && r + 32 <= rows) for (int i = 16; i < 32; ++i) prefetch_row(from + (r + i) * stride, cols);
      std::int64_t c = 0;
      for (; c + 16 <= cols; c += 16) {
        if (wide) for (int i = 0; i < 16; ++i) __builtin_prefetch(from + (r + i) * stride + c + 128, 0, 2);
        __m512 block[16];
        for (int i = 0; i < 16; ++i) block[i] = reinterpret_cast<__m512>(Vec<float>::load(from + (r + i) * stride + c).v);
        transpose_in_registers(block);
        for (int i = 0; i < 16; ++i) _mm512_mask_storeu_ps(to + (c + i) * padded + r, detail::all16, block[i]);
      }
      for (; c < cols; ++c)
        for (int i = 0; i < 16; ++i) to[c * padded + r + i] = static_cast<A>(from[(r + i) * stride + c]);
    }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>)
    for (; r + 8 <= rows; r += 8) {
      const bool wide = cols > 128;  // then within these rows, not the next ones whole
      if (!wide && r + 16 <= rows) for (int i = 8; i < 16; ++i) prefetch_row(from + (r + i) * stride, cols);
      std::int64_t c = 0;
      for (; c + 8 <= cols; c += 8) {
        if (wide) for (int i = 0; i < 8; ++i) __builtin_prefetch(from + (r + i) * stride + c + 128, 0, 2);
        __m256 block[8];
        for (int i = 0; i < 8; ++i) block[i] = _mm256_loadu_ps(from + (r + i) * stride + c);
        transpose_in_registers(block);
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (c + i) * padded + r, block[i]);
      }
      for (; c < cols; ++c)
        for (int i = 0; i < 8; ++i) to[c * padded + r + i] = static_cast<A>(from[(r + i) * stride + c]);
    }
#endif
  for (; r < rows; ++r) {
    if (r + prefetch_distance < rows) prefetch_row(from + (r + prefetch_distance) * stride, cols);
    for (std::int64_t c = 0; c < cols; ++c) to[c * padded + r] = static_cast<A>(from[r * stride + c]);
  }
  for (std::int64_t c = 0; c < cols; ++c)
    for (r = rows; r < padded; ++r) to[c * padded + r] = A(0);
}

/// Copies rows x cols of a padded A matrix into a strided T matrix.
template <class A, class T>
void store_tile(std::int64_t rows, std::int64_t cols, std::int64_t padded, const A* from, T* to, std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for_blocks<A>(cols, [&](std::int64_t c, auto m) { Vec<A>::load(from + r * padded + c, m).store(to + r * stride + c, m); });
}

}  // namespace capstan::kernels::cpu
