#include <kernels/cpu/strip_gemm.h>
#include <kernels/cpu/panel_tile.h>

#include <omp.h>

#include <algorithm>

#if defined(CAPSTAN_PANEL_TILE) && !defined(CAPSTAN_AVX512)

namespace capstan::kernels::cpu {

namespace {

using namespace panel;

// Caches decide the blocks: the most of k that is summed at once, rows of A in a strip, floats of B that are packed at once.
constexpr std::int64_t strips_k = 384, most_strip = 144, group_floats = 1 << 20;
constexpr std::int64_t grain = 48;  ///< threads share rows by it: whole tiles, whole lines

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

/// The same of A transposed: columns [i, i + m) of A as stored. A few rows at a time, so that whole lines are written in turn
/// and rows that fall on the same cache sets do not drive each other out.
void pack_columns(const float* a, std::int64_t lda, std::int64_t m, std::int64_t k, float* to, std::int64_t apart) {
  const __m256i six = _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, 0, 0);
  for (std::int64_t p0 = 0; p0 < k; p0 += chunk) {
    const std::int64_t p1 = std::min(k, p0 + chunk);
    for (std::int64_t t = 0; t * tile_m < m; ++t) {
      const float* from = a + p0 * lda + t * tile_m;
      float* out = to + t * apart + p0 * tile_m;
      const std::int64_t left = m - t * tile_m;
      for (std::int64_t p = p0; p < p1; ++p, from += lda, out += tile_m) {  // 8 are stored, of which the next k overwrites the last two
        if (left >= 8) _mm256_storeu_ps(out, _mm256_loadu_ps(from));
        else if (left >= tile_m) _mm256_storeu_ps(out, _mm256_maskload_ps(from, six));
        else
          for (std::int64_t r = 0; r < tile_m; ++r) out[r] = r < left ? from[r] : 0.f;
      }
    }
  }
}

/// `count` panels of B from column j on, over k rows from k0. B as stored is read in rows, a few at a time.
void pack_panels(const Gemm& g, const float* b, std::int64_t k0, std::int64_t k, std::int64_t j, std::int64_t count, float* to) {
  constexpr std::int64_t rows = 8;
  const std::int64_t whole = g.trans_b ? 0 : std::min(count, (g.n - j) / tile_n);
  for (std::int64_t p0 = 0; p0 < k && whole > 0; p0 += rows) {
    const std::int64_t p1 = std::min(k, p0 + rows);
    for (std::int64_t q = 0; q < whole; ++q)
      for (std::int64_t p = p0; p < p1; ++p)
        for (int v = 0; v < across; ++v)
          V::load(b + (k0 + p) * g.ldb + j + q * tile_n + v * V::lanes).store(to + (q * k + p) * tile_n + v * V::lanes);
  }
  for (std::int64_t q = whole; q < count; ++q) pack_panel(g, b, k0, k, j + q * tile_n, to + q * k * tile_n);
}

/// Lines of a block of k that will be packed, handed out in small lists: each tile that is summed asks for one.
struct Asks {
  const float* at = nullptr;
  std::int64_t wide = 1, across = 0, along = 0, step = 0, total = 0, asked = 0;
  /// Rows of `lines` lines each, one per k: a list takes one line of every row in a sixteenth of them.
  static Asks of_rows_of_k(const float* at, std::int64_t ld, std::int64_t lines, std::int64_t k) {
    return {at, lines, 16, (k + chunk - 1) / chunk * ld, ld, lines * chunk};
  }
  /// Rows that k runs along: a list takes one.
  static Asks of_rows(const float* at, std::int64_t ld, std::int64_t rows) { return {at, 1, 0, ld, chunk, rows}; }
  /// Gives the next list, if any is left, to `lines`.
  void give(Lines& lines) {
    if (asked < total) lines = {at + asked % wide * across + asked / wide * along, step}, ++asked;
  }
};

}  // namespace

// Strips of up to 144 rows of A, packed 6 by 6, against all panels of one block of k (or as many as `group_floats` holds): a
// strip stays in the second-level cache, panels come from the third, each asked for while the one before is summed with.
// Meanwhile come the next strip and, during the last strip, what the next block of k starts with.
void strip_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
  const std::int64_t kc = block_of(g.k, strips_k), panels = (g.n + tile_n - 1) / tile_n, grains = (g.m + grain - 1) / grain;
  // A tile's pad takes what its last store writes too much, and keeps tiles from falling on the same cache sets.
  const std::int64_t tile_floats = tile_m * kc + 16, a_row = g.trans_a ? 1 : g.lda, a_col = g.trans_a ? g.lda : 1;
  const int threads = threads_for(context, g);
  const Grid grid = grid_of(grains * (grain / tile_m), panels, threads, 25, 15);
  float* const before = static_cast<float*>(g.before_gelu);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), wanted = grid.rows * grid.cols;
    for (int me = omp_get_thread_num(); me < wanted; me += team) {  // a smaller team does all the shares
      const std::int64_t row = me / grid.cols, col = me % grid.cols;
      const std::int64_t i0 = std::min(g.m, grains * row / grid.rows * grain), i1 = std::min(g.m, grains * (row + 1) / grid.rows * grain);
      const std::int64_t p0 = panels * col / grid.cols, p1 = panels * (col + 1) / grid.cols;
      const std::int64_t strips = std::max<std::int64_t>(1, (i1 - i0 + most_strip - 1) / most_strip);
      const std::int64_t strip = ((i1 - i0 + strips - 1) / strips + tile_m - 1) / tile_m * tile_m;
      const std::int64_t group = std::min(std::max<std::int64_t>(1, p1 - p0), std::max<std::int64_t>(1, group_floats / (kc * tile_n)));
      float* packed = static_cast<float*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(strip / tile_m * tile_floats + group * tile_n * kc) * sizeof(float)));
      float* strip_of = packed + group * tile_n * kc;
      for (std::int64_t p = p0; p < p1; p += group)
        for (std::int64_t k0 = 0; k0 < g.k; k0 += kc) {
          const std::int64_t k = std::min(kc, g.k - k0), chunks = (k + chunk - 1) / chunk, count = std::min(group, p1 - p);
          pack_panels(g, b, k0, k, p * tile_n, count, packed);
          const bool first_k = k0 == 0, last_k = k0 + kc >= g.k;
          const std::int64_t next_k = std::min(kc, g.k - k0 - kc);
          for (std::int64_t i = i0; i < i1; i += strip) {
            const std::int64_t m = std::min(strip, i1 - i);
            const float* from = a + i * a_row + k0 * a_col;
            if (g.trans_a) pack_columns(from, g.lda, m, k, strip_of, tile_floats);
            else pack_rows(from, g.lda, m, k, strip_of, tile_floats);
            const auto ask_for = [&](const float* at, std::int64_t rows, std::int64_t of_k) {
              return g.trans_a ? Asks::of_rows_of_k(at, g.lda, (rows + 15) / 16, of_k) : Asks::of_rows(at, g.lda, rows);
            };
            Asks of_a, of_b;
            if (i + strip < i1) {
              of_a = ask_for(from + strip * a_row, std::min(strip, i1 - i - strip), k);
            } else if (!last_k) {
              of_a = ask_for(a + i0 * a_row + (k0 + kc) * a_col, std::min(strip, i1 - i0), next_k);
              if (!g.trans_b) of_b = Asks::of_rows_of_k(b + (k0 + kc) * g.ldb + p * tile_n, g.ldb, count, next_k);
            }
            for (std::int64_t q = 0; q < count; ++q) {
              const std::int64_t j = (p + q) * tile_n, n = std::min(tile_n, g.n - j);
              const float* panel = packed + q * k * tile_n;
              const float* next_panel = packed + (q + 1 < count ? q + 1 : 0) * k * tile_n;
              for (std::int64_t t = 0; t * tile_m < m; ++t) {
                float* to = c + (i + t * tile_m) * g.ldc + j;
                const float* own = strip_of + t * tile_floats;
                const bool last = (t + 1) * tile_m >= m;
                Next next{{own, 0}, {next_panel + t * chunks * 16, 16}, {own, 0}, !last ? to + tile_m * g.ldc : q + 1 < count ? c + i * g.ldc + j + tile_n : to, g.ldc};
                of_a.give(next.first);
                of_b.give(next.third);
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

}  // namespace capstan::kernels::cpu

#endif
