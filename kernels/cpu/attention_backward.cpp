// The gradient of tiled attention: scores are rebuilt tile by tile from the saved log-sum-exp (Dao et al.
// 2022, algorithm 4). One thread owns the keys and values of one (sequence, key/value head), so sums run in
// a fixed order whatever the number of threads.
#include <kernels/cpu/ahead.h>
#include <kernels/cpu/attention.h>
#include <kernels/cpu/tile_gemm.h>

#include <omp.h>

#include <algorithm>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t tile = attention_tile, band = 16;
std::int64_t pad(std::int64_t n) { return (n + 15) / 16 * 16; }

/// What one thread holds: q, dout and dq of one head and dk, dv of its group, one sequence whole; one key tile's k, v.
/// `whole`: the longest sequence's rows or keys, the greater.
template <class A>
struct Buffers {
  A *q, *dout, *dq, *dk, *dv, *delta, *k, *kt, *vt, *prob, *grad;
  static std::int64_t need(std::int64_t whole, std::int64_t dp) { return whole * dp * 5 + whole + tile * dp * 3 + 2 * tile * tile; }
  Buffers(A* p, std::int64_t whole, std::int64_t dp) {
    q = p, dout = q + whole * dp, dq = dout + whole * dp, dk = dq + whole * dp, dv = dk + whole * dp;
    delta = dv + whole * dp, k = delta + whole, kt = k + tile * dp, vt = kt + tile * dp;
    prob = vt + tile * dp, grad = prob + tile * tile;
  }
};

/// One head of sequence s against its keys and values: adds to b.dk and b.dv (begins them when `fresh`, stores them when
/// `last`), leaves b.dq.
template <class A, class T>
void backward_head(const Buffers<A>& b, const AttentionArgs<T>& a, std::int64_t s, std::int64_t h, std::int64_t g, bool fresh, bool last, Ahead& ahead) {
  const std::int64_t begin = a.starts[s], length = a.starts[s + 1] - begin, key_begin = a.key_begin(s), held = a.key_count(s), past = held - length;
  if (length == 0) return;
  using V = Vec<A>;
  const std::int64_t d = a.head_size, dp = pad(d), tiles = (length + tile - 1) / tile;
  // Tiles of queries against one tile of keys; 50 steps each.
  const std::int64_t across = a.window > 0 ? std::min(tiles, (a.window - 1) / tile + 2) : tiles, steps = 25 * across * (2 * tiles - across + 1);
  const std::int64_t portion = (ahead.rows() + steps - 1) / steps;
  const A* lse = static_cast<const A*>(a.lse) + h * a.rows + begin;
  for (std::int64_t kt0 = 0; kt0 < held; kt0 += tile) {
    const std::int64_t keys = std::min(tile, held - kt0);
    const T* k_rows = a.k + (key_begin + kt0) * a.k_stride + g * d;
    const T* v_rows = a.v + (key_begin + kt0) * a.v_stride + g * d;
    load_tile(keys, d, dp, k_rows, a.k_stride, b.k);
    load_tile_transposed(keys, d, tile, b.k, dp, b.kt);
    load_tile_transposed(keys, d, tile, v_rows, a.v_stride, b.vt);
    A* dk = b.dk + kt0 * dp;
    A* dv = b.dv + kt0 * dp;
    // Rows from that of the first key on, while they see the last.
    const std::int64_t end = a.window > 0 ? std::min(length, kt0 + keys - 1 + a.window - past) : length;
    for (std::int64_t q0 = kt0 > past ? (kt0 - past) / tile * tile : 0; q0 < end; q0 += tile) {
      const std::int64_t rows = std::min(tile, length - q0);
      const bool first = first_seen(past + q0, a.window) / tile * tile == kt0;
      // On the diagonal, bands of 16 rows see only the keys up to their end: a third of the tile is left out.
      const bool diagonal = past + q0 == kt0;
      if (first) {  // every tile is copied just before its first use
        load_tile(rows, d, dp, a.q + (begin + q0) * a.q_stride + h * d, a.q_stride, b.q + q0 * dp);
        load_tile(rows, d, dp, a.dout + (begin + q0) * a.dout_stride + h * d, a.dout_stride, b.dout + q0 * dp);
        for (std::int64_t r = q0; r < q0 + rows; ++r) {
          const T* o = a.out + (begin + r) * a.out_stride + h * d;
          if (r + prefetch_distance < length) prefetch_row(o + prefetch_distance * a.out_stride, d);
          const A* go = b.dout + r * dp;
          b.delta[r] = sum_blocks<A>(d, [&](std::int64_t i, auto m) { return V::load(o + i, m) * V::load(go + i, m); });
        }
      }
      for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile) {
        const std::int64_t m = std::min(diagonal ? band : tile, rows - r), n = diagonal ? r + band : tile;
        tile_gemm<A>(ahead, portion, m, n, d, b.q + (q0 + r) * dp, dp, 1, b.kt, tile, b.prob + r * tile, tile, false);
        tile_gemm<A>(ahead, portion, m, n, d, b.dout + (q0 + r) * dp, dp, 1, b.vt, tile, b.grad + r * tile, tile, false);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        A* pr = b.prob + r * tile;
        A* gr = b.grad + r * tile;
        const V l(lse[q0 + r]), dl(b.delta[q0 + r]), sc(static_cast<A>(a.scale));
        const std::int64_t valid = std::clamp<std::int64_t>(past + q0 + r + 1 - kt0, 0, keys);
        const std::int64_t seen = diagonal ? r / band * band + band : tile;
        for (std::int64_t c = 0; c < seen; c += V::lanes) {
          const V e = exp_flushed(fma(V::load(pr + c), sc, -l));
          e.store(pr + c);
          (e * (V::load(gr + c) - dl) * sc).store(gr + c);
        }
        for (std::int64_t c = valid; c < seen; ++c) pr[c] = A(0), gr[c] = A(0);
        const std::int64_t hidden = std::min(seen, first_seen(past + q0 + r, a.window) - kt0);
        for (std::int64_t c = 0; c < hidden; ++c) pr[c] = A(0), gr[c] = A(0);
      }
      for (std::int64_t c = 0; c < keys; c += diagonal ? band : tile) {
        const std::int64_t m = std::min(diagonal ? band : tile, keys - c), from = diagonal ? c : 0;
        tile_gemm<A>(ahead, portion, m, dp, rows - from, b.prob + from * tile + c, 1, tile, b.dout + (q0 + from) * dp, dp, dv + c * dp, dp, !(fresh && diagonal));
        tile_gemm<A>(ahead, portion, m, dp, rows - from, b.grad + from * tile + c, 1, tile, b.q + (q0 + from) * dp, dp, dk + c * dp, dp, !(fresh && diagonal));
      }
      for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile) {
        const std::int64_t m = std::min(diagonal ? band : tile, rows - r);
        tile_gemm<A>(ahead, portion, m, dp, diagonal ? std::min(keys, r + band) : keys, b.grad + r * tile, tile, 1, b.k, dp, b.dq + (q0 + r) * dp, dp, !first);
      }
      // With the tile of its own key a row's dq is whole.
      if (kt0 + tile >= past + q0 + rows) store_tile(rows, d, dp, b.dq + q0 * dp, a.dq + (begin + q0) * a.dq_stride + h * d, a.dq_stride);
    }
    if (last) {
      store_tile(keys, d, dp, dk, a.dk + (key_begin + kt0) * a.dkv_stride + g * d, a.dkv_stride);
      store_tile(keys, d, dp, dv, a.dv + (key_begin + kt0) * a.dkv_stride + g * d, a.dkv_stride);
    }
  }
}

}  // namespace

template <class T>
void attention_backward(Context& context, const AttentionArgs<T>& a) {
  using A = Compute<T>;
  // Sequences [of[i], of[i + 1]) share keys: their gradients add up on one thread.
  std::vector<std::int64_t> of;
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < a.sequences; ++s) {
    longest = std::max<std::int64_t>({longest, a.starts[s + 1] - a.starts[s], a.key_count(s)});
    if (a.key_begins == nullptr || s == 0 || a.key_begins[s] != a.key_begins[s - 1]) of.push_back(s);
  }
  of.push_back(a.sequences);
  const std::int64_t d = a.head_size, dp = pad(d), group = a.heads / a.kv_heads, items = (static_cast<std::int64_t>(of.size()) - 1) * a.kv_heads;
  const std::int64_t whole = (longest + tile - 1) / tile * tile;
  const std::size_t need = static_cast<std::size_t>(Buffers<A>::need(whole, dp)) * sizeof(A);
  context.reserve_scratch(context.threads(), need);
#pragma omp parallel num_threads(context.threads())
  {
    const Buffers<A> b(static_cast<A*>(context.scratch(omp_get_thread_num(), need)), whole, dp);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const auto first = static_cast<std::size_t>(item / a.kv_heads);
      const std::int64_t g = item % a.kv_heads;
      const bool zeroed = a.key_begins != nullptr;  // a tile's first rows may not be those of its own keys
      if (zeroed) {
        const std::int64_t most = a.key_count(of[first + 1] - 1) * dp;
        std::fill(b.dk, b.dk + most, A(0));
        std::fill(b.dv, b.dv + most, A(0));
      }
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h)
        for (std::int64_t s = of[first]; s < of[first + 1]; ++s) {
          const std::int64_t begin = a.starts[s], length = a.starts[s + 1] - begin;
          const bool fresh = !zeroed && h == g * group, last = h + 1 == (g + 1) * group && s + 1 == of[first + 1];
          Ahead ahead;
          const std::int64_t most = std::min<std::int64_t>(length, 512);  // what the second-level cache holds beside the buffers
          ahead.add(a.dq + begin * a.dq_stride + h * d, most, d, a.dq_stride);
          if (last) {
            ahead.add(a.dk + a.key_begin(s) * a.dkv_stride + g * d, most, d, a.dkv_stride);
            ahead.add(a.dv + a.key_begin(s) * a.dkv_stride + g * d, most, d, a.dkv_stride);
          }
          backward_head(b, a, s, h, g, fresh, last, ahead);
        }
    }
  }
}

template void attention_backward<double>(Context&, const AttentionArgs<double>&);
template void attention_backward<float>(Context&, const AttentionArgs<float>&);
template void attention_backward<bf16>(Context&, const AttentionArgs<bf16>&);

}  // namespace capstan::kernels::cpu
