// The gradient of tiled attention: scores are rebuilt tile by tile from the saved log-sum-exp (Dao et al.
// 2022, algorithm 4). One thread owns the keys and values of one (sequence, key/value head), so sums run in
// a fixed order whatever the number of threads.
#include <kernels/cpu/attention.h>
#include <kernels/cpu/tile_gemm.h>

#include <omp.h>

#include <algorithm>
#include <vector>

namespace capstan::kernels::cpu {

namespace {
constexpr std::int64_t tile = attention_tile, band = 16;
std::int64_t pad(std::int64_t n) { return (n + 15) / 16 * 16; }
}  // namespace

template <class T>
void attention_backward(Context& context, const AttentionArgs<T>& a) {
  using A = Compute<T>;
  using V = Vec<A>;
  const std::int64_t d = a.head_size, dp = pad(d), group = a.heads / a.kv_heads, items = a.sequences * a.kv_heads;
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < a.sequences; ++s) longest = std::max<std::int64_t>(longest, a.starts[s + 1] - a.starts[s]);
  const std::int64_t whole = (longest + tile - 1) / tile * tile;
#pragma omp parallel num_threads(context.threads())
  {
    // Per thread: q, dout and dq of one head and dk, dv of its group, one sequence whole; one key tile's k, v.
    const std::int64_t need = whole * dp * 5 + whole + tile * dp * 3 + 2 * tile * tile;
    A* p = static_cast<A*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(need) * sizeof(A)));
    A* q = p;
    A* dout = q + whole * dp;
    A* dq = dout + whole * dp;
    A* all_dk = dq + whole * dp;
    A* all_dv = all_dk + whole * dp;
    A* delta = all_dv + whole * dp;
    A* k = delta + whole;
    A* kt = k + tile * dp;
    A* vt = kt + tile * dp;
    A* prob = vt + tile * dp;
    A* grad = prob + tile * tile;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const std::int64_t s = item / a.kv_heads, g = item % a.kv_heads, begin = a.starts[s], length = a.starts[s + 1] - begin;
      std::fill(all_dk, all_dk + length * dp, A(0));
      std::fill(all_dv, all_dv + length * dp, A(0));
      for (std::int64_t j = 0; j < group; ++j) {
        const std::int64_t h = g * group + j;
        load_tile(length, d, dp, a.q + begin * a.q_stride + h * d, a.q_stride, q);
        load_tile(length, d, dp, a.dout + begin * a.dout_stride + h * d, a.dout_stride, dout);
        const A* lse = static_cast<const A*>(a.lse) + h * a.rows + begin;
        for (std::int64_t r = 0; r < length; ++r) {
          const T* o = a.out + (begin + r) * a.out_stride + h * d;
          if (r + prefetch_distance < length) prefetch_row(o + prefetch_distance * a.out_stride, d);
          const A* go = dout + r * dp;
          delta[r] = sum_blocks<A>(d, [&](std::int64_t i, auto m) { return V::load(o + i, m) * V::load(go + i, m); });
        }
        std::fill(dq, dq + length * dp, A(0));
        for (std::int64_t kt0 = 0; kt0 < length; kt0 += tile) {
          const std::int64_t keys = std::min(tile, length - kt0);
          const T* k_rows = a.k + (begin + kt0) * a.k_stride + g * d;
          const T* v_rows = a.v + (begin + kt0) * a.v_stride + g * d;
          load_tile(keys, d, dp, k_rows, a.k_stride, k);
          load_tile_transposed(keys, d, tile, k_rows, a.k_stride, kt);
          load_tile_transposed(keys, d, tile, v_rows, a.v_stride, vt);
          A* dk = all_dk + kt0 * dp;
          A* dv = all_dv + kt0 * dp;
          for (std::int64_t q0 = kt0; q0 < length; q0 += tile) {
            const std::int64_t rows = std::min(tile, length - q0);
            // On the diagonal, bands of 16 rows see only the keys up to their end: a third of the tile is left out.
            const bool diagonal = q0 == kt0;
            for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile) {
              const std::int64_t m = std::min(diagonal ? band : tile, rows - r), n = diagonal ? r + band : tile;
              tile_gemm<A>(m, n, d, q + (q0 + r) * dp, dp, 1, kt, tile, prob + r * tile, tile, false);
              tile_gemm<A>(m, n, d, dout + (q0 + r) * dp, dp, 1, vt, tile, grad + r * tile, tile, false);
            }
            for (std::int64_t r = 0; r < rows; ++r) {
              A* pr = prob + r * tile;
              A* gr = grad + r * tile;
              const V l(lse[q0 + r]), dl(delta[q0 + r]), sc(static_cast<A>(a.scale));
              const std::int64_t valid = std::min(keys, q0 + r + 1 - kt0);
              const std::int64_t seen = diagonal ? r / band * band + band : tile;
              for (std::int64_t c = 0; c < seen; c += V::lanes) {
                const V e = exp_flushed(fma(V::load(pr + c), sc, -l));
                e.store(pr + c);
                (e * (V::load(gr + c) - dl) * sc).store(gr + c);
              }
              for (std::int64_t c = valid; c < tile; ++c) pr[c] = A(0), gr[c] = A(0);
            }
            for (std::int64_t c = 0; c < keys; c += diagonal ? band : tile) {
              const std::int64_t m = std::min(diagonal ? band : tile, keys - c), from = diagonal ? c : 0;
              tile_gemm<A>(m, dp, rows - from, prob + from * tile + c, 1, tile, dout + (q0 + from) * dp, dp, dv + c * dp, dp, true);
              tile_gemm<A>(m, dp, rows - from, grad + from * tile + c, 1, tile, q + (q0 + from) * dp, dp, dk + c * dp, dp, true);
            }
            for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile) {
              const std::int64_t m = std::min(diagonal ? band : tile, rows - r);
              tile_gemm<A>(m, dp, diagonal ? std::min(keys, r + band) : keys, grad + r * tile, tile, 1, k, dp, dq + (q0 + r) * dp, dp, true);
            }
          }
        }
        store_tile(length, d, dp, dq, a.dq + begin * a.dq_stride + h * d, a.dq_stride);
      }
      store_tile(length, d, dp, all_dk, a.dk + begin * a.dkv_stride + g * d, a.dkv_stride);
      store_tile(length, d, dp, all_dv, a.dv + begin * a.dkv_stride + g * d, a.dkv_stride);
    }
  }
}

template void attention_backward<double>(Context&, const AttentionArgs<double>&);
template void attention_backward<float>(Context&, const AttentionArgs<float>&);
template void attention_backward<bf16>(Context&, const AttentionArgs<bf16>&);

}  // namespace capstan::kernels::cpu
