// f32 products from B in packed panels that stay in the second-level cache, for AVX-512; with AVX2 strip_gemm() does them.
#include <kernels/cpu/panel_gemm.h>
#include <kernels/cpu/panel_tile.h>
#include <kernels/cpu/strip_gemm.h>

#include <omp.h>

#include <algorithm>
#include <stdexcept>

namespace capstan::kernels::cpu {

#if defined(CAPSTAN_PANEL_TILE)

#if defined(CAPSTAN_AVX512)
namespace {

using namespace panel;

// Caches decide the blocks: the most of k that is summed at once, and how many panels are packed at once.
constexpr std::int64_t rows_k = 768, rows_group = 4, columns_k = 512, columns_group = 6;

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

/// A as stored: a few panels at a time against all rows.
void rows_of_a(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
  constexpr std::int64_t group = rows_group;
  const std::int64_t kc = block_of(g.k, rows_k), tiles = (g.m + tile_m - 1) / tile_m, panels = (g.n + tile_n - 1) / tile_n;
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(tiles, panels, threads);
  float* const before = static_cast<float*>(g.before_gelu);
  const std::size_t need = static_cast<std::size_t>(group * tile_n * kc) * sizeof(float);
  context.reserve_scratch(threads, need);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {  // a smaller team does all the shares
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), need));
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
              Next next{{rows, 0}, {rows, 0}, {rows, 0}, q + 1 < count ? to + tile_n : to + tile_m * g.ldc - (count - 1) * tile_n, g.ldc};
              if (2 * q < tile_m && i + 2 * tile_m <= i1) {
                next.first = {rows + (tile_m + 2 * q) * g.lda, chunk}, next.second = {next.first.at + g.lda, chunk};
              } else if (asked + 1 < next_rows) {
                next.first = {next_b + asked * g.ldb, chunk}, next.second = {next.first.at + g.ldb, chunk};
                asked += 2;
              }
              const bool last = k0 + kc >= g.k;
              any_tile<false>(m, std::min(tile_n, g.n - j), k, rows, g.lda, packed + q * k * tile_n,
                              {to, g.ldc, k0 > 0 || g.accumulate ? to : residual != nullptr ? residual + i * g.ldc + j : nullptr,
                               last && bias != nullptr ? bias + j : nullptr}, next);
              if (last && before != nullptr) {
                gelu_of_tile(m, std::min(tile_n, g.n - j), to, before + i * g.ldc + j, g.ldc);
                if (q + 1 < count) ask_for_rows<true>(m, before + i * g.ldc + j + tile_n, g.ldc);
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
  const std::int64_t tile_floats = tile_m * kc + 16, floats = strip_tiles * tile_floats + group * tile_n * kc;
  const std::int64_t lines = (strip * 4 + 63) / 64 + (g.lda % 16 != 0 || reinterpret_cast<std::uintptr_t>(a) % 64 != 0 ? 1 : 0);
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(grains * (grain / tile_m), panels, threads);
  const std::size_t need = static_cast<std::size_t>(floats) * sizeof(float);
  context.reserve_scratch(threads, need);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), need));
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
                Next next{{own, 0}, {own, 0}, {own, 0}, !last ? to + tile_m * g.ldc : q + 1 < count ? c + i * g.ldc + j + tile_n : c + (more ? i + strip : i0) * g.ldc + p * tile_n, g.ldc};
                if (next_a != nullptr && asked < lines * chunk) {
                  next.first = {next_a + asked % lines * 16 + asked / lines * chunks * g.lda, g.lda};
                  ++asked;
                }
                if (asked_b < b_lines * chunk) {
                  next.second = {next_b + asked_b / b_lines * chunks * g.ldb + asked_b % b_lines * 16, g.ldb};
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

}  // namespace
#endif

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

bool strips_serve(const Gemm& g) {
#if defined(CAPSTAN_AVX512)
  return false;  // gradients are the library's
#else
  return has_panel_gemm(g) && g.m > 0 && g.n > 0 && g.k > 0;
#endif
}

void panel_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
#if defined(CAPSTAN_AVX512)
  if (g.trans_a) columns_of_a(context, g, a, b, c);
  else rows_of_a(context, g, a, b, c, bias, residual);
#else
  strip_gemm(context, g, a, b, c, bias, residual);
#endif
}

#else

bool has_panel_gemm(const Gemm&) { return false; }
bool panels_are_better(const Gemm&) { return false; }
bool strips_serve(const Gemm&) { return false; }
void panel_gemm(Context&, const Gemm&, const float*, const float*, float*, const float*, const float*) { throw std::logic_error("no panel_gemm in this build"); }

#endif

}  // namespace capstan::kernels::cpu
