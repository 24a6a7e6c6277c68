// Products in register tiles, 6 x 64 with AVX-512 (24 accumulators of 16) and 6 x 16 with AVX2 (12 of 8), B in packed panels
// of that many columns that stay in the second-level cache. While a tile is summed, what comes next is asked for: rows of
// A, lines of C that will be written, the source of the next panels. Operands in a training step are cold, and waiting for
// them is what products otherwise lose.
#include <kernels/cpu/panel_gemm.h>
#include <kernels/cpu/tile_gemm.h>
#include <kernels/shared/elements.h>

#include <omp.h>

#include <algorithm>
#include <stdexcept>

namespace capstan::kernels::cpu {

#if defined(CAPSTAN_AVX512) || (defined(__AVX2__) && defined(__FMA__))

namespace {

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

// Registers decide the tile, caches the blocks: the most of k that is summed at once, and how many panels are packed at once.
#if defined(CAPSTAN_AVX512)
constexpr int across = 4;
constexpr std::int64_t rows_k = 768, rows_group = 4, columns_k = 512, columns_group = 6;
#else
constexpr int across = 2;
constexpr std::int64_t strips_k = 384, group_floats = 1 << 20;
#endif
constexpr std::int64_t tile_m = 6, tile_n = across * V::lanes, chunk = 16;

/// What to ask for: one line per chunk of k and list, `step` floats apart; and the next tile of C.
struct Next {
  const float *first, *second;
  std::int64_t first_step, second_step;
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
__attribute__((noinline)) void tile(std::int64_t k, const float* a, std::int64_t lda, const float* b, const Into& into, const Next& next) {
  const std::int64_t row = Packed ? 1 : lda, col = Packed ? tile_m : 1;
  V sum[R][across];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < across; ++v) sum[r][v] = V::broadcast(0.f);
  const float *first = next.first, *second = next.second, *c_line = next.c, *add_line = into.add != nullptr ? into.add : into.c;
  int in_row = 0;
  for (; k > 0; k -= chunk, a += chunk * col, b += chunk * tile_n) {
    __builtin_prefetch(first, 0, 2), first += next.first_step;
    __builtin_prefetch(second, 0, 2), second += next.second_step;
    __builtin_prefetch(c_line, 1, 3), c_line += 16;
    __builtin_prefetch(add_line, 0, 2), add_line += 16;
    if (++in_row == tile_n / 16) in_row = 0, c_line += next.ldc - tile_n, add_line += into.ldc - tile_n;
    const auto step = [&](int p) __attribute__((always_inline)) {
      V y[across];
      for (int v = 0; v < across; ++v) y[v] = V::load(b + p * tile_n + v * V::lanes);
      for (int r = 0; r < R; ++r) {
        const V x = V::broadcast(a[r * row + p * col]);
        for (int v = 0; v < across; ++v) sum[r][v] = V::fma(x, y[v], sum[r][v]);
      }
    };
    if (k >= chunk) {
#pragma GCC unroll 4
      for (int p = 0; p < chunk; ++p) step(p);
    } else {
      for (int p = 0; p < k; ++p) step(p);
    }
  }
  float* c = into.c;
  if (into.add != nullptr)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < across; ++v) sum[r][v] = V::load(into.add + r * into.ldc + v * V::lanes) + sum[r][v];
  if (into.bias != nullptr)
    for (int v = 0; v < across; ++v) {
      const V y = V::load(into.bias + v * V::lanes);
      for (int r = 0; r < R; ++r) sum[r][v] = sum[r][v] + y;
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < across; ++v) sum[r][v].store(c + r * into.ldc + v * V::lanes);
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
void gelu_of_tile(std::int64_t m, std::int64_t n, float* c, float* before, std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; ++r, c += ldc, before += ldc)
    for_blocks<float>(n, [&](std::int64_t i, auto mask) {
      const Vec<float> v = Vec<float>::load(c + i, mask);
      v.store(before + i, mask);
      gelu_of(v).store(c + i, mask);
    });
}

/// Asks for the rows of `before` that the next tile will write.
void ask_for_rows(std::int64_t m, const float* before, std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < tile_n; i += 16) __builtin_prefetch(before + r * ldc + i, 1, 3);
}

/// k's blocks: even ones of at most `most`; they depend on k alone.
std::int64_t block_of(std::int64_t k, std::int64_t most) {
  const std::int64_t blocks = std::max<std::int64_t>(1, (k + most - 1) / most);
  return ((k + blocks - 1) / blocks + chunk - 1) / chunk * chunk;
}

/// Columns [j, j + n) of B over k rows as a panel [k][tile_n], zeros beyond n.
void pack_panel(const Gemm& g, const float* b, std::int64_t k0, std::int64_t k, std::int64_t j, float* to) {
  const std::int64_t n = std::min(tile_n, g.n - j);
  if (g.trans_b) load_tile_transposed<float, float>(n, k, tile_n, b + j * g.ldb + k0, g.ldb, to);
  else load_tile<float, float>(k, n, tile_n, b + k0 * g.ldb + j, g.ldb, to);
}

/// How threads share an m x n product: `rows` of them along m, the others along n.
struct Grid { int rows, cols; };
Grid grid_of(std::int64_t tiles, std::int64_t panels, int threads) {
  Grid best{1, threads};
  double least = 0;
  for (int rows = 1; rows <= threads; ++rows) {
    if (threads % rows != 0) continue;
    const std::int64_t cols = threads / rows, own_panels = (panels + cols - 1) / cols, own_tiles = (tiles + rows - 1) / rows;
    const double cost = static_cast<double>(own_panels) * (static_cast<double>(own_tiles) * 12 + 25);  // cycles for one k: tiles, packing
    if (rows == 1 || cost < least) least = cost, best = {rows, static_cast<int>(cols)};
  }
  return best;
}

/// Waking a team costs more than a small product.
int threads_for(const Context& context, const Gemm& g) { return g.m * g.n * g.k < 262144 ? 1 : context.threads(); }

#if defined(CAPSTAN_AVX512)

/// A as stored: a few panels at a time against all rows.
void rows_of_a(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
  constexpr std::int64_t group = rows_group;
  const std::int64_t kc = block_of(g.k, rows_k), tiles = (g.m + tile_m - 1) / tile_m, panels = (g.n + tile_n - 1) / tile_n;
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(tiles, panels, threads);
  float* const before = static_cast<float*>(g.before_gelu);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {  // a smaller team does all the shares
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(group * tile_n * kc) * sizeof(float)));
      const std::int64_t row = me / grid.cols, col = me % grid.cols;
      const std::int64_t i0 = tiles * row / grid.rows * tile_m, i1 = std::min(g.m, tiles * (row + 1) / grid.rows * tile_m);
      const std::int64_t p0 = panels * col / grid.cols, p1 = panels * (col + 1) / grid.cols;
      for (std::int64_t p = p0; p < p1; p += group)
        for (std::int64_t k0 = 0; k0 < g.k; k0 += kc) {
          const std::int64_t k = std::min(kc, g.k - k0), count = std::min(group, p1 - p);
          for (std::int64_t q = 0; q < count; ++q) pack_panel(g, b, k0, k, (p + q) * tile_n, packed + q * k * tile_n);
          // The next block of B that will be packed: its rows (of B as stored) are asked for two at a time.
          const bool more_k = k0 + kc < g.k;
          const std::int64_t next_j = (more_k ? p : p + group) * tile_n, next_rows = g.trans_b ? std::min(group * tile_n, std::min(g.n, p1 * tile_n) - next_j) : 0;
          const float* next_b = next_rows > 0 ? b + next_j * g.ldb + (more_k ? k0 + kc : 0) : nullptr;
          for (std::int64_t i = i0, asked = 0; i < i1; i += tile_m) {
            const std::int64_t m = std::min(tile_m, i1 - i);
            for (std::int64_t q = 0; q < count; ++q) {
              const std::int64_t j = (p + q) * tile_n;
              const float* rows = a + i * g.lda + k0;
              float* to = c + i * g.ldc + j;
              Next next{rows, rows, 0, 0, q + 1 < count ? to + tile_n : to + tile_m * g.ldc - (count - 1) * tile_n, g.ldc};
              if (2 * q < tile_m && i + 2 * tile_m <= i1) {
                next.first = rows + (tile_m + 2 * q) * g.lda, next.second = next.first + g.lda;
                next.first_step = next.second_step = chunk;
              } else if (asked + 1 < next_rows) {
                next.first = next_b + asked * g.ldb, next.second = next.first + g.ldb;
                next.first_step = next.second_step = chunk;
                asked += 2;
              }
              const bool last = k0 + kc >= g.k;
              any_tile<false>(m, std::min(tile_n, g.n - j), k, rows, g.lda, packed + q * k * tile_n,
                              {to, g.ldc, k0 > 0 || g.accumulate ? to : residual != nullptr ? residual + i * g.ldc + j : nullptr,
                               last && bias != nullptr ? bias + j : nullptr}, next);
              if (last && before != nullptr) {
                gelu_of_tile(m, std::min(tile_n, g.n - j), to, before + i * g.ldc + j, g.ldc);
                if (q + 1 < count) ask_for_rows(m, before + i * g.ldc + j + tile_n, g.ldc);
              }
            }
          }
        }
    }
  }
}

/// A transposed (gradients of weights): a few panels of one block of k at a time, against strips of 96 rows of C that are
/// packed from the columns of A as stored, 6 by 6.
void columns_of_a(Context& context, const Gemm& g, const float* a, const float* b, float* c) {
  constexpr std::int64_t strip = 96, strip_tiles = strip / tile_m, group = columns_group, grain = 48;  // a grain: whole tiles, whole lines
  const std::int64_t kc = block_of(g.k, columns_k), panels = (g.n + tile_n - 1) / tile_n, grains = (g.m + grain - 1) / grain;
  // A tile's pad takes what its last store writes too much, and keeps tiles from falling on the same cache sets.
  const std::int64_t tile_floats = tile_m * kc + 16, need = strip_tiles * tile_floats + group * tile_n * kc;
  const std::int64_t lines = (strip * 4 + 63) / 64 + (g.lda % 16 != 0 || reinterpret_cast<std::uintptr_t>(a) % 64 != 0 ? 1 : 0);
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(grains * (grain / tile_m), panels, threads);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(need) * sizeof(float)));
      float* strip_of = packed + group * tile_n * kc;
      const std::int64_t row = me / grid.cols, col = me % grid.cols;
      const std::int64_t i0 = std::min(g.m, grains * row / grid.rows * grain), i1 = std::min(g.m, grains * (row + 1) / grid.rows * grain);
      const std::int64_t p0 = panels * col / grid.cols, p1 = panels * (col + 1) / grid.cols;
      for (std::int64_t p = p0; p < p1; p += group)
        for (std::int64_t k0 = 0; k0 < g.k; k0 += kc) {
          const std::int64_t k = std::min(kc, g.k - k0), chunks = (k + chunk - 1) / chunk, count = std::min(group, p1 - p);
          for (std::int64_t q = 0; q < count; ++q) pack_panel(g, b, k0, k, (p + q) * tile_n, packed + q * k * tile_n);
          // The next block: the columns of its first strip, its panels. One line of many rows at a time.
          const bool more_k = k0 + kc < g.k, more_p = p + group < p1, whole = !more_k || k0 + 2 * kc <= g.k;
          const float* next_rows_a = more_k ? a + (k0 + kc) * g.lda : a;
          const float* next_b = !whole || g.trans_b ? nullptr : more_k ? b + (k0 + kc) * g.ldb + p * tile_n : more_p ? b + (p + group) * tile_n : nullptr;
          const std::int64_t b_lines = next_b == nullptr ? 0 : tile_n / 16 * (more_k ? count : std::min(group, p1 - p - group));
          std::int64_t asked_b = 0;
          for (std::int64_t i = i0; i < i1; i += strip) {
            const std::int64_t m = std::min(strip, i1 - i);
            const float* from = a + k0 * g.lda + i;
            if (m == strip) {
              for (std::int64_t r = 0; r < k; ++r)
                for (std::int64_t t = 0; t < strip_tiles; ++t)  // 8 are stored, of which the next k overwrites the last two
                  _mm256_storeu_ps(strip_of + t * tile_floats + r * tile_m,
                                   t + 1 < strip_tiles ? _mm256_loadu_ps(from + r * g.lda + t * tile_m)
                                                       : _mm256_maskload_ps(from + r * g.lda + t * tile_m, _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0)));
            } else {
              for (std::int64_t t = 0; t * tile_m < m; ++t)
                for (std::int64_t r = 0; r < k; ++r)
                  for (std::int64_t x = 0; x < tile_m; ++x) strip_of[t * tile_floats + r * tile_m + x] = t * tile_m + x < m ? from[r * g.lda + t * tile_m + x] : 0.f;
            }
            const bool more = i + strip < i1;
            const float* next_a = more ? from + strip : more_k && whole ? next_rows_a + i0 : !more_k && more_p ? next_rows_a + i0 : nullptr;
            std::int64_t asked = 0;
            for (std::int64_t q = 0; q < count; ++q)
              for (std::int64_t t = 0; t * tile_m < m; ++t) {
                const std::int64_t j = (p + q) * tile_n;
                float* to = c + (i + t * tile_m) * g.ldc + j;
                const float* own = strip_of + t * tile_floats;
                const bool last = (t + 1) * tile_m >= m;
                Next next{own, own, 0, 0, !last ? to + tile_m * g.ldc : q + 1 < count ? c + i * g.ldc + j + tile_n : c + (more ? i + strip : i0) * g.ldc + p * tile_n, g.ldc};
                if (next_a != nullptr && asked < lines * chunk) {
                  next.first = next_a + asked % lines * 16 + asked / lines * chunks * g.lda, next.first_step = g.lda;
                  ++asked;
                }
                if (asked_b < b_lines * chunk) {
                  next.second = next_b + asked_b / b_lines * chunks * g.ldb + asked_b % b_lines * 16, next.second_step = g.ldb;
                  ++asked_b;
                }
                any_tile<true>(std::min(tile_m, m - t * tile_m), std::min(tile_n, g.n - j), k, own, tile_m, packed + q * k * tile_n,
                               {to, g.ldc, g.accumulate || k0 > 0 ? to : nullptr, nullptr}, next);
              }
          }
        }
    }
  }
}

#else

/// Rows [i, i + m) of A over columns [k0, k0 + k) as tiles [k][6], `apart` floats from one to the next, zeros beyond m.
void pack_rows(const float* a, std::int64_t lda, std::int64_t m, std::int64_t k, float* to, std::int64_t apart) {
  for (std::int64_t t = 0; t * tile_m < m; ++t, to += apart) {
    const std::int64_t rows = std::min(tile_m, m - t * tile_m);
    const float* from = a + t * tile_m * lda;
    std::int64_t p = 0;
    for (; p + 8 <= k; p += 8) {
      __m256 block[8];
      for (int r = 0; r < 8; ++r) block[r] = r < rows ? _mm256_loadu_ps(from + r * lda + p) : _mm256_setzero_ps();
      transpose_in_registers(block);
      for (int x = 0; x < 8; ++x) _mm256_storeu_ps(to + (p + x) * tile_m, block[x]);  // the next one overwrites the last two
    }
    for (; p < k; ++p)
      for (std::int64_t r = 0; r < tile_m; ++r) to[p * tile_m + r] = r < rows ? from[r * lda + p] : 0.f;
  }
}

/// The same of A transposed: columns [i, i + m) of A as stored.
void pack_columns(const float* a, std::int64_t lda, std::int64_t m, std::int64_t k, float* to, std::int64_t apart) {
  const std::int64_t whole = m / tile_m;
  for (std::int64_t p = 0; p < k; ++p) {
    const float* from = a + p * lda;
    for (std::int64_t t = 0; t < whole; ++t)  // 8 are stored, of which the next k overwrites the last two
      _mm256_storeu_ps(to + t * apart + p * tile_m,
                       (t + 1) * tile_m + 2 <= m ? _mm256_loadu_ps(from + t * tile_m)
                                                 : _mm256_maskload_ps(from + t * tile_m, _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0)));
    if (whole * tile_m < m)
      for (std::int64_t r = 0; r < tile_m; ++r) to[whole * apart + p * tile_m + r] = whole * tile_m + r < m ? from[whole * tile_m + r] : 0.f;
  }
}

/// Strips of 144 rows of A, packed 6 by 6, against all panels of one block of k (or as many as `group_floats` holds): a
/// strip stays in the second-level cache, panels come from the third, each asked for while the one before is summed with.
void in_strips(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
  constexpr std::int64_t strip = 144, strip_tiles = strip / tile_m, grain = 48;  // a grain: whole tiles, whole lines
  const std::int64_t kc = block_of(g.k, strips_k), panels = (g.n + tile_n - 1) / tile_n, grains = (g.m + grain - 1) / grain;
  // A tile's pad takes what its last store writes too much, and keeps tiles from falling on the same cache sets.
  const std::int64_t tile_floats = tile_m * kc + 16, a_row = g.trans_a ? 1 : g.lda, a_col = g.trans_a ? g.lda : 1;
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(grains * (grain / tile_m), panels, threads);
  float* const before = static_cast<float*>(g.before_gelu);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {  // a smaller team does all the shares
      const std::int64_t row = me / grid.cols, col = me % grid.cols;
      const std::int64_t i0 = std::min(g.m, grains * row / grid.rows * grain), i1 = std::min(g.m, grains * (row + 1) / grid.rows * grain);
      const std::int64_t p0 = panels * col / grid.cols, p1 = panels * (col + 1) / grid.cols;
      const std::int64_t group = std::min(std::max<std::int64_t>(1, p1 - p0), std::max<std::int64_t>(1, group_floats / (kc * tile_n)));
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(strip_tiles * tile_floats + group * tile_n * kc) * sizeof(float)));
      float* strip_of = packed + group * tile_n * kc;
      for (std::int64_t p = p0; p < p1; p += group)
        for (std::int64_t k0 = 0; k0 < g.k; k0 += kc) {
          const std::int64_t k = std::min(kc, g.k - k0), chunks = (k + chunk - 1) / chunk, count = std::min(group, p1 - p);
          for (std::int64_t q = 0; q < count; ++q) pack_panel(g, b, k0, k, (p + q) * tile_n, packed + q * k * tile_n);
          const bool first_k = k0 == 0, last_k = k0 + kc >= g.k;
          for (std::int64_t i = i0; i < i1; i += strip) {
            const std::int64_t m = std::min(strip, i1 - i);
            const float* from = a + i * a_row + k0 * a_col;
            if (g.trans_a) pack_columns(from, g.lda, m, k, strip_of, tile_floats);
            else pack_rows(from, g.lda, m, k, strip_of, tile_floats);
            // The next strip, one line of many rows (A transposed) or many lines of one row at a time.
            const std::int64_t next_m = std::max<std::int64_t>(0, std::min(strip, i1 - i - strip)), asks = g.trans_a ? (next_m + 15) / 16 * chunk : next_m;
            const float* next_a = from + strip * a_row;
            std::int64_t asked = 0;
            for (std::int64_t q = 0; q < count; ++q) {
              const std::int64_t j = (p + q) * tile_n, n = std::min(tile_n, g.n - j);
              const float* panel = packed + q * k * tile_n;
              const float* next_panel = packed + (q + 1 < count ? q + 1 : 0) * k * tile_n;
              for (std::int64_t t = 0; t * tile_m < m; ++t) {
                float* to = c + (i + t * tile_m) * g.ldc + j;
                const float* own = strip_of + t * tile_floats;
                const bool last = (t + 1) * tile_m >= m;
                Next next{own, next_panel + t * chunks * 16, 0, 16, !last ? to + tile_m * g.ldc : q + 1 < count ? c + i * g.ldc + j + tile_n : to, g.ldc};
                if (asked < asks) {
                  if (g.trans_a) next.first = next_a + asked / chunk * 16 + asked % chunk * chunks * g.lda, next.first_step = g.lda;
                  else next.first = next_a + asked * g.lda, next.first_step = chunk;
                  ++asked;
                }
                const float* add = !first_k || g.accumulate ? to : residual != nullptr ? residual + (i + t * tile_m) * g.ldc + j : nullptr;
                any_tile<true>(std::min(tile_m, m - t * tile_m), n, k, own, tile_m, panel, {to, g.ldc, add, last_k && bias != nullptr ? bias + j : nullptr}, next);
                if (last_k && before != nullptr) {
                  float* second = before + (i + t * tile_m) * g.ldc + j;
                  gelu_of_tile(std::min(tile_m, m - t * tile_m), n, to, second, g.ldc);
                  if (!last) ask_for_rows(std::min(tile_m, m - (t + 1) * tile_m), second + tile_m * g.ldc, g.ldc);
                }
              }
            }
          }
        }
    }
  }
}

#endif

}  // namespace

bool has_panel_gemm(const Gemm& g) {
  return g.a == Num::f32 && g.b == Num::f32 && g.c == Num::f32 && g.batch == 1 && !(g.trans_a && g.bias);
}

// Measured beside oneDNN in steps of training, on Emerald Rapids and on Zen 3. The choice hangs on the shape alone.
bool panels_are_better(const Gemm& g) {
#if defined(CAPSTAN_AVX512)
  return has_panel_gemm(g) && g.trans_a && g.m * g.n >= (1 << 23);  // the head's weight gradient: the library waits for an output of hundreds of megabytes
#else
  return has_panel_gemm(g);  // about as fast, faster where a small output has a long sum, and the same bits for any number of threads
#endif
}

void panel_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
#if defined(CAPSTAN_AVX512)
  if (g.trans_a) columns_of_a(context, g, a, b, c);
  else rows_of_a(context, g, a, b, c, bias, residual);
#else
  in_strips(context, g, a, b, c, bias, residual);
#endif
}

#else

bool has_panel_gemm(const Gemm&) { return false; }
bool panels_are_better(const Gemm&) { return false; }
void panel_gemm(Context&, const Gemm&, const float*, const float*, float*, const float*, const float*) { throw std::logic_error("no panel_gemm in this build"); }

#endif

}  // namespace capstan::kernels::cpu
