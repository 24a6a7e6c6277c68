#include <kernels/cpu/strip_gemm.h>
#include <kernels/cpu/panel_tile.h>

#include <omp.h>

#include <algorithm>
#include <atomic>

#if defined(CAPSTAN_PANEL_TILE) && !defined(CAPSTAN_AVX512)

namespace capstan::kernels::cpu {

namespace {

using namespace panel;

// Caches decide the blocks: the most of k that is summed at once, rows of A in a strip, floats of B that are packed at once
// (of A transposed fewer: k is long there, and what is packed next can be asked for meanwhile).
constexpr std::int64_t strips_k = 384, most_strip = 144, rows_floats = 1 << 21, columns_floats = 1 << 19;
constexpr std::int64_t grain = 48;  ///< strips are multiples of it: whole tiles, whole lines

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
/// and rows that fall on the same cache sets do not drive each other out. With Sum each column's sum is added to `sums`.
template <bool Sum>
void pack_columns(const float* a, std::int64_t lda, std::int64_t m, std::int64_t k, float* to, std::int64_t apart, float* sums) {
  for (std::int64_t p0 = 0; p0 < k; p0 += chunk) {
    const std::int64_t p1 = std::min(k, p0 + chunk);
    for (std::int64_t t = 0; t * tile_m < m; ++t) {
      const float* from = a + p0 * lda + t * tile_m;
      float* out = to + t * apart + p0 * tile_m;
      const std::int64_t left = m - t * tile_m, rows = std::min(left, tile_m);
      const auto rows_of = [&](auto load) {  // 8 are stored, of which the next k overwrites the last two
        __m256 total = _mm256_setzero_ps();
        for (std::int64_t p = p0; p < p1; ++p, from += lda, out += tile_m) {
          const __m256 row = load(from);
          _mm256_storeu_ps(out, row);
          if constexpr (Sum) total = _mm256_add_ps(total, row);
        }
        return total;
      };
      const __m256i lanes = detail::first_of_8(static_cast<int>(rows));
      const __m256 total = left >= 8 ? rows_of([](const float* p) CAPSTAN_LAMBDA { return _mm256_loadu_ps(p); })
                                     : rows_of([&](const float* p) CAPSTAN_LAMBDA { return _mm256_maskload_ps(p, lanes); });
      if constexpr (Sum) {
        float of[8];
        _mm256_storeu_ps(of, total);
        for (std::int64_t r = 0; r < rows; ++r) sums[t * tile_m + r] += of[r];
      }
    }
  }
}

/// Rows [p0, p1) of `count` panels of B from column j on, which hold k rows from k0. B as stored is read in rows, a few at a time.
void pack_panels(const Gemm& g, const float* b, std::int64_t k0, std::int64_t k, std::int64_t p0, std::int64_t p1, std::int64_t j, std::int64_t count, float* to) {
  constexpr std::int64_t rows = 8;
  const std::int64_t whole = std::min(count, (g.n - j) / tile_n);
  for (; p0 < p1; p0 += rows) {
    const std::int64_t end = std::min(p1, p0 + rows);
    for (std::int64_t q = 0; q < whole; ++q)
      for (std::int64_t p = p0; p < end; ++p)
        for (int v = 0; v < across; ++v)
          V::load(b + (k0 + p) * g.ldb + j + q * tile_n + v * V::lanes).store(to + (q * k + p) * tile_n + v * V::lanes);
    for (std::int64_t q = whole; q < count; ++q)
      for (std::int64_t p = p0; p < end; ++p)
        for (std::int64_t x = 0; x < tile_n; ++x) to[(q * k + p) * tile_n + x] = j + q * tile_n + x < g.n ? b[(k0 + p) * g.ldb + j + q * tile_n + x] : 0.f;
  }
}

/// Rows in strips that threads claim in turn: large ones, then small ones, so that threads end together.
struct Strips {
  std::int64_t m, strip, large, count;
  Strips(std::int64_t rows, int threads) : m(rows) {
    const std::int64_t even = (m + 2 * threads - 1) / (2 * threads);
    strip = std::min(most_strip, (even + grain - 1) / grain * grain);
    large = threads == 1 ? m / strip : (m - m / 8) / strip;
    count = large + (m - large * strip + grain - 1) / grain;
  }
  std::int64_t begin(std::int64_t s) const { return s < large ? s * strip : std::min(m, large * strip + (s - large) * grain); }
};

/// How much of B is packed at once, at most about `floats`: `panels` of it over `k`, all of k where enough panels then fit.
struct Portion {
  std::int64_t panels, k;
  Portion(std::int64_t all_panels, std::int64_t all_k, std::int64_t block, std::int64_t floats) {
    const std::int64_t wanted = std::min<std::int64_t>(all_panels, 96), fit = floats / (all_k * tile_n);  // packing A pays over that many
    if (fit >= wanted) panels = std::min(all_panels, fit), k = all_k;
    else panels = wanted, k = std::max<std::int64_t>(1, floats / (panels * tile_n) / block) * block;
  }
};

/// Panels of B from `first` on over k from `begin` on, which stay packed while all strips of A pass; packed in pieces that
/// threads claim.
struct Phase {
  static constexpr std::int64_t piece_rows = 96, piece_panels = 4;
  const Gemm& g;
  std::int64_t kc, first, count, begin, end;
  std::int64_t pieces_of_block() const { return g.trans_b ? (count + piece_panels - 1) / piece_panels : (kc + piece_rows - 1) / piece_rows; }
  std::int64_t pieces() const { return (end - begin + kc - 1) / kc * pieces_of_block(); }
  void pack(const float* b, std::int64_t piece, float* packed) const {
    const std::int64_t k0 = begin + piece / pieces_of_block() * kc, at = piece % pieces_of_block(), k = std::min(kc, g.k - k0);
    if (k0 >= end) return;  // other phases may have more pieces
    float* to = packed + (k0 - begin) * count * tile_n;
    if (g.trans_b)
      for (std::int64_t q = at * piece_panels; q < std::min(count, (at + 1) * piece_panels); ++q) pack_panel(g, b, k0, k, (first + q) * tile_n, to + q * k * tile_n);
    else pack_panels(g, b, k0, k, at * piece_rows, std::min(k, (at + 1) * piece_rows), first * tile_n, count, to);
  }
};

/// Lines of a block of k that will be packed, handed out in small lists: each tile that is summed asks for one.
struct Asks {
  const float* at = nullptr;
  std::int64_t wide = 1, across = 0, along = 0, step = 0, total = 0, asked = 0;
  /// Rows of `lines` lines each: a list takes one line of `each` rows, as many as a tile has chunks.
  static Asks of_lines(const float* at, std::int64_t ld, std::int64_t lines, std::int64_t rows, std::int64_t each) {
    return {at, lines, 16, each * ld, ld, lines * ((rows + each - 1) / each)};
  }
  /// Rows that k runs along: a list takes one.
  static Asks of_rows(const float* at, std::int64_t ld, std::int64_t rows) { return {at, 1, 0, ld, chunk, rows}; }
  /// Gives the next list, if any is left, to `lines`.
  void give(Lines& lines) {
    if (asked < total) lines = {at + asked % wide * across + asked / wide * along, step}, ++asked;
  }
};

}  // namespace

// Panels of B that stay in the third-level cache are packed by all threads together; then threads claim strips of up to 144
// rows of A, packed 6 by 6 for a block of k at a time, which stay in the second-level cache while panels pass, each asked for
// while the one before is summed with. Claims, because processors are not equally fast: with fixed halves one waited for the
// other 9 % of a step. A thread claims one strip ahead, so that what it packs next can be asked for, and then B's next portion;
// a thread that finds no more strips packs of that portion, in memory of its own, while others end.
void strip_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual) {
  const std::int64_t kc = block_of(g.k, strips_k), all_panels = (g.n + tile_n - 1) / tile_n;
  // A tile's pad takes what its last store writes too much, and keeps tiles from falling on the same cache sets.
  const std::int64_t tile_floats = tile_m * kc + 16, a_row = g.trans_a ? 1 : g.lda, a_col = g.trans_a ? g.lda : 1;
  const int threads = threads_for(context, g);
  const Strips strips(g.m, threads);
  const Portion portion(all_panels, g.k, kc, g.trans_a ? columns_floats : rows_floats);
  const std::int64_t along_k = (g.k + portion.k - 1) / portion.k, phases = (all_panels + portion.panels - 1) / portion.panels * along_k;
  const auto phase_of = [&](std::int64_t phase) {
    const std::int64_t first = phase / along_k * portion.panels, begin = phase % along_k * portion.k;
    return Phase{g, kc, first, std::min(portion.panels, all_panels - first), begin, std::min(g.k, begin + portion.k)};
  };
  // Few strips are cut along the panels too.
  const std::int64_t parts = threads == 1 ? 1 : std::clamp<std::int64_t>((4 * threads + strips.count - 1) / strips.count, 1, std::max<std::int64_t>(1, portion.panels / 4));
  const std::int64_t items = strips.count * parts, pieces = phase_of(0).pieces(), copies = phases > 1 ? 2 : 1;
  const std::int64_t strip_floats = (std::min(strips.strip, g.m) + tile_m - 1) / tile_m * tile_floats, b_floats = portion.panels * tile_n * std::min(portion.k, g.k);
  float *const before = static_cast<float*>(g.before_gelu), *const sums = static_cast<float*>(g.sums_of_a);
  const float* const slope_at = static_cast<const float*>(g.gelu_slope_of);
  float* const packed = static_cast<float*>(context.scratch(0, static_cast<std::size_t>(copies * b_floats + strip_floats) * sizeof(float)));
  const std::size_t strip_bytes = static_cast<std::size_t>(strip_floats) * sizeof(float);
  context.reserve_scratch(threads, strip_bytes);
  std::atomic<std::int64_t> claims{0}, piece_claims{0};  // they count through the phases
  const auto claim = [](std::atomic<std::int64_t>& of) { return of.fetch_add(1, std::memory_order_relaxed); };
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    float* const strip_of = me == 0 ? packed + copies * b_floats : static_cast<float*>(context.scratch(me, strip_bytes));
    std::int64_t mine = claim(claims), piece = claim(piece_claims);
    const auto ask_for = [&](const float* at, std::int64_t rows, std::int64_t of_k) {
      return g.trans_a ? Asks::of_lines(at, g.lda, (rows + 15) / 16, of_k, kc / chunk) : Asks::of_rows(at, g.lda, rows);
    };
    const auto pack = [&](std::int64_t index) {
      if (index == phases) return;
      const Phase phase = phase_of(index);
      for (; piece < (index + 1) * pieces; piece = claim(piece_claims)) phase.pack(b, piece % pieces, packed + index % copies * b_floats);
    };
    pack(0);
    for (std::int64_t index = 0; index < phases; ++index) {
      const Phase phase = phase_of(index);
      const float* const portion_of = packed + index % copies * b_floats;
      const std::int64_t p = phase.first, count = phase.count, k_end = phase.end;
      Asks of_b;  // a part of what is packed next
      if (!g.trans_b && k_end < g.k) {
        const std::int64_t next_k = std::min(portion.k, g.k - k_end), first = k_end + next_k * me / team;
        of_b = Asks::of_lines(b + first * g.ldb + p * tile_n, g.ldb, count, k_end + next_k * (me + 1) / team - first, kc / chunk);
      }
#pragma omp barrier  // this phase is packed, and no strip of the last one is still summed
      while (mine < (index + 1) * items) {
        const std::int64_t item = mine % items, i = strips.begin(item / parts), m = strips.begin(item / parts + 1) - i;
        const std::int64_t q0 = count * (item % parts) / parts, q1 = count * (item % parts + 1) / parts;
        mine = claim(claims);
        for (std::int64_t k0 = phase.begin; k0 < k_end; k0 += kc) {
          const std::int64_t k = std::min(kc, g.k - k0), chunks = (k + chunk - 1) / chunk;
          const bool first_k = k0 == 0, last_k = k0 + kc >= g.k, last_here = k0 + kc >= k_end;
          const float* panels = portion_of + (k0 - phase.begin) * count * tile_n;
          const float* from = a + i * a_row + k0 * a_col;
          if (sums != nullptr && p == 0 && item % parts == 0) {  // A's columns pass once with these
            float here[most_strip] = {};
            pack_columns<true>(from, g.lda, m, k, strip_of, tile_floats, here);
            for (std::int64_t r = 0; r < m; ++r) sums[i + r] = first_k && !g.accumulate ? here[r] : sums[i + r] + here[r];
          } else if (g.trans_a) {
            pack_columns<false>(from, g.lda, m, k, strip_of, tile_floats, nullptr);
          } else {
            pack_rows(from, g.lda, m, k, strip_of, tile_floats);
          }
          Asks of_a;
          if (!last_here) {
            of_a = ask_for(from + kc * a_col, m, std::min(kc, g.k - k0 - kc));
          } else if (mine < phases * items) {
            const std::int64_t next = strips.begin(mine % items / parts), next_k = mine < (index + 1) * items ? phase.begin : k_end < g.k ? k_end : 0;
            of_a = ask_for(a + next * a_row + next_k * a_col, strips.begin(mine % items / parts + 1) - next, std::min(kc, g.k - next_k));
          }
          for (std::int64_t q = q0; q < q1; ++q) {
            const std::int64_t j = (p + q) * tile_n, n = std::min(tile_n, g.n - j), next_j = (q + 1 < q1 ? p + q + 1 : p + q0) * tile_n;
            const float* panel = panels + q * k * tile_n;
            const float* next_panel = panels + (q + 1 < q1 ? q + 1 : last_here ? q0 : q1) * k * tile_n;
            for (std::int64_t t = 0; t * tile_m < m; ++t) {
              const std::int64_t at = (i + t * tile_m) * g.ldc + j, rows = std::min(tile_m, m - t * tile_m);
              float* to = c + at;
              const float* own = strip_of + t * tile_floats;
              const std::int64_t next_at = (t + 1) * tile_m < m ? at + tile_m * g.ldc : i * g.ldc + next_j;
              Next next{{own, 0}, {next_panel + t * chunks * 16, 16}, {own, 0}, c + next_at, g.ldc};
              of_a.give(next.first);
              of_b.give(next.third);
              const float* add = !first_k || g.accumulate ? to : residual != nullptr ? residual + at : nullptr;
              any_tile<true>(rows, n, k, own, tile_m, panel, {to, g.ldc, add, last_k && bias != nullptr ? bias + j : nullptr}, next);
              if (!last_k) continue;
              if (before != nullptr) {
                gelu_of_tile(rows, n, to, before + at, g.ldc);
                ask_for_rows<true>(tile_m, before + next_at, g.ldc);
              }
              if (slope_at != nullptr) {
                slope_of_tile(rows, n, to, slope_at + at, g.ldc);
                ask_for_rows<false>(tile_m, slope_at + next_at, g.ldc);
              }
            }
          }
        }
      }
      pack(index + 1);
    }
  }
}

}  // namespace capstan::kernels::cpu

#endif
