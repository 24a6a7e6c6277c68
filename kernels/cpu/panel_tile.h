// defines: the register tile of packed f32 products and what surrounds it: 6 x 64 with AVX-512 (24 accumulators of 16) and
// 6 x 16 with AVX2 (12 of 8). While a tile is summed, what comes next is asked for: operands in a training step are cold, and
// waiting for them is what products otherwise lose. Internal to kernels/cpu.
#pragma once
#include <kernels/cpu/gemm.h>
#include <kernels/cpu/tile_gemm.h>
#include <kernels/shared/elements.h>

#include <algorithm>
#include <type_traits>

#if defined(CAPSTAN_AVX512) || (defined(__AVX2__) && defined(__FMA__))
#define CAPSTAN_PANEL_TILE 1

namespace capstan::kernels::cpu {
namespace panel {

/// One vector register of floats.
struct V {
#if defined(CAPSTAN_AVX512)
  using Raw = __m512;
  static constexpr int lanes = 16;
  static CAPSTAN_INLINE V load(const float* p) { return {_mm512_maskz_loadu_ps(detail::all16, p)}; }
  CAPSTAN_INLINE void store(float* p) const { _mm512_mask_storeu_ps(p, detail::all16, v); }
  static CAPSTAN_INLINE V broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static CAPSTAN_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
#else
  using Raw = __m256;
  static constexpr int lanes = 8;
  static CAPSTAN_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  CAPSTAN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  static CAPSTAN_INLINE V broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static CAPSTAN_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#endif
  Raw v;
  friend CAPSTAN_INLINE V operator+(V a, V b) { return {a.v + b.v}; }
};

#if defined(CAPSTAN_AVX512)
constexpr int across = 4;
#else
constexpr int across = 2;
#endif
constexpr std::int64_t tile_m = 6, tile_n = across * V::lanes, chunk = 16;

/// Lines to ask for, one per chunk of k, `step` floats apart.
struct Lines {
  const float* at;
  std::int64_t step;
};

/// What to ask for while a tile is summed: lines of what will be packed or read next; and the next tile of C.
struct Next {
  Lines first, second, third;
  const float* c;
  std::int64_t ldc;
};

/// How a block's sum enters C.
struct Into {
  float* c;
  std::int64_t ldc;
  const float* add;  ///< rows ldc apart: what is there, a residual, or null
  const float* bias;  ///< of the tile's columns, or null
};

/// R x tile_n over k of one block; A as stored (rows lda apart) or packed (k runs of 6), B a panel [k][tile_n].
template <bool Packed, int R>
__attribute__((noinline)) void tile(std::int64_t k, const float* a, std::int64_t lda, const float* b, const Into& target, const Next& next) {
  const Into into = target;  // stores to C might change the original, for all that the compiler knows
  const std::int64_t row = Packed ? 1 : lda, col = Packed ? tile_m : 1;
  V sum[R][across];
  each<R>([&](auto r) CAPSTAN_LAMBDA { each<across>([&](auto v) CAPSTAN_LAMBDA { sum[r][v] = V::broadcast(0.f); }); });
  Lines first = next.first, second = next.second, third = next.third;
  const float *c_line = next.c, *add_line = into.add != nullptr ? into.add : into.c;
  int in_row = 0;
  do {  // k > 0: a loop that might not run would bring the sums by way of the stack
    __builtin_prefetch(first.at, 0, 2), first.at += first.step;
    __builtin_prefetch(second.at, 0, 2), second.at += second.step;
    __builtin_prefetch(third.at, 0, 2), third.at += third.step;
    __builtin_prefetch(c_line, 1, 3), c_line += 16;
    __builtin_prefetch(add_line, 0, 2), add_line += 16;
    if (++in_row == tile_n / 16) in_row = 0, c_line += next.ldc - tile_n, add_line += into.ldc - tile_n;
    const auto step = [&](int p) CAPSTAN_LAMBDA {
      V y[across];
      each<across>([&](auto v) CAPSTAN_LAMBDA { y[v] = V::load(b + p * tile_n + v * V::lanes); });
      each<R>([&](auto r) CAPSTAN_LAMBDA {
        const V x = V::broadcast(a[r * row + p * col]);
        each<across>([&](auto v) CAPSTAN_LAMBDA { sum[r][v] = V::fma(x, y[v], sum[r][v]); });
      });
    };
    if (k >= chunk) {
#pragma GCC unroll 4
      for (int p = 0; p < chunk; ++p) step(p);
    } else {
      for (int p = 0; p < k; ++p) step(p);
    }
    k -= chunk, a += chunk * col, b += chunk * tile_n;
  } while (k > 0);
  const auto finish = [&](auto add, auto bias) CAPSTAN_LAMBDA {  // one pass for each case
    each<R>([&](auto r) CAPSTAN_LAMBDA {
      each<across>([&](auto v) CAPSTAN_LAMBDA {
        V x = sum[r][v];
        if constexpr (add) x = V::load(into.add + r * into.ldc + v * V::lanes) + x;
        if constexpr (bias) x = x + V::load(into.bias + v * V::lanes);
        x.store(into.c + r * into.ldc + v * V::lanes);
      });
    });
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (into.add == nullptr) into.bias == nullptr ? finish(no, no) : finish(no, yes);
  else into.bias == nullptr ? finish(yes, no) : finish(yes, yes);
}

template <bool Packed>
void tile_of(std::int64_t m, std::int64_t k, const float* a, std::int64_t lda, const float* b, const Into& into, const Next& next) {
  switch (m) {
    case 1: return tile<Packed, 1>(k, a, lda, b, into, next);
    case 2: return tile<Packed, 2>(k, a, lda, b, into, next);
    case 3: return tile<Packed, 3>(k, a, lda, b, into, next);
    case 4: return tile<Packed, 4>(k, a, lda, b, into, next);
    case 5: return tile<Packed, 5>(k, a, lda, b, into, next);
    default: return tile<Packed, 6>(k, a, lda, b, into, next);
  }
}

/// m <= 6 rows and n <= tile_n columns of C; fewer columns go by way of a tile of their own.
template <bool Packed>
void any_tile(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b, const Into& into, const Next& next) {
  if (n == tile_n) return tile_of<Packed>(m, k, a, lda, b, into, next);
  alignas(64) float out[tile_m * tile_n] = {}, bias[tile_n] = {};
  if (into.add != nullptr)
    for (std::int64_t r = 0; r < m; ++r) std::copy_n(into.add + r * into.ldc, n, out + r * tile_n);
  if (into.bias != nullptr) std::copy_n(into.bias, n, bias);
  tile_of<Packed>(m, k, a, lda, b, {out, tile_n, into.add != nullptr ? out : nullptr, into.bias != nullptr ? bias : nullptr}, next);
  for (std::int64_t r = 0; r < m; ++r) std::copy_n(out + r * tile_n, n, into.c + r * into.ldc);
}

/// What a tile of C came to, its first row at c, goes to `before` and becomes its GELU; the tile is still in the first-level cache.
inline void gelu_of_tile(std::int64_t m, std::int64_t n, float* c, float* before, std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; ++r, c += ldc, before += ldc)
    for_blocks<float>(n, [&](std::int64_t i, auto mask) {
      const Vec<float> v = Vec<float>::load(c + i, mask);
      v.store(before + i, mask);
      gelu_of(v).store(c + i, mask);
    });
}

/// A tile of C, its first row at c and in the first-level cache, times GELU's slope at `at`.
inline void slope_of_tile(std::int64_t m, std::int64_t n, float* c, const float* at, std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; ++r, c += ldc, at += ldc)
    for_blocks<float>(n, [&](std::int64_t i, auto mask) { (Vec<float>::load(c + i, mask) * gelu_slope(Vec<float>::load(at + i, mask))).store(c + i, mask); });
}

/// Asks for the rows beside C that the next tile will write or read.
template <bool Write>
void ask_for_rows(std::int64_t m, const float* rows, std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < tile_n; i += 16) __builtin_prefetch(rows + r * ldc + i, Write ? 1 : 0, 3);
}

/// k's blocks: even ones of at most `most`; they depend on k alone.
inline std::int64_t block_of(std::int64_t k, std::int64_t most) {
  const std::int64_t blocks = std::max<std::int64_t>(1, (k + most - 1) / most);
  return ((k + blocks - 1) / blocks + chunk - 1) / chunk * chunk;
}

/// Columns [j, j + n) of B over k rows as a panel [k][tile_n], zeros beyond n.
inline void pack_panel(const Gemm& g, const float* b, std::int64_t k0, std::int64_t k, std::int64_t j, float* to) {
  const std::int64_t n = std::min(tile_n, g.n - j);
  if (g.trans_b) load_tile_transposed<float, float>(n, k, tile_n, b + j * g.ldb + k0, g.ldb, to);
  else load_tile<float, float>(k, n, tile_n, b + k0 * g.ldb + j, g.ldb, to);
}

/// Waking a team costs more than a small product.
inline int threads_for(const Context& context, const Gemm& g) { return g.m * g.n * g.k < 262144 ? 1 : context.threads(); }

}  // namespace panel
}  // namespace capstan::kernels::cpu

#endif
