// Tiled attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): scores exist for one
// 64 x 64 tile at a time. One row's arithmetic never depends on the other rows of its tile.
#include <kernels/cpu/attention.h>
#include <kernels/cpu/tile_gemm.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t tile = attention_tile;

std::int64_t pad(std::int64_t n, std::int64_t lanes) { return (n + lanes - 1) / lanes * lanes; }

/// Work of one thread: which sequence and which rows of it (a tile of query rows).
struct RowTile { std::int32_t sequence; std::int64_t first; };

template <class A>
struct Buffers {
  A *q, *kt, *v, *scores, *out, *max, *sum;
};

/// One tile of query rows against key tiles 0 .. last, tile pointers by `keys(t)` and `values(t)`.
template <class A, class T, class KeyTile, class ValueTile>
void query_tile(const Buffers<A>& b, std::int64_t rows, std::int64_t first_position, std::int64_t head_size, double scale,
                const T* q, std::int64_t q_stride, KeyTile keys, std::int64_t k_stride, ValueTile values, std::int64_t v_stride,
                T* out, std::int64_t out_stride, A* lse) {
  using V = Vec<A>;
  const std::int64_t d_pad = pad(head_size, V::lanes);
  load_tile(rows, head_size, head_size, q, q_stride, b.q);
  for (std::int64_t i = 0; i < rows * head_size; ++i) b.q[i] *= static_cast<A>(scale);
  for (std::int64_t r = 0; r < rows; ++r) b.max[r] = -std::numeric_limits<A>::infinity(), b.sum[r] = A(0);
  std::fill(b.out, b.out + rows * d_pad, A(0));
  const std::int64_t last_position = first_position + rows - 1;
  for (std::int64_t t = 0; t * tile <= last_position; ++t) {
    const std::int64_t count = std::min(tile, last_position + 1 - t * tile);
    load_tile_transposed(count, head_size, tile, keys(t), k_stride, b.kt);
    tile_gemm<A>(rows, tile, head_size, b.q, head_size, 1, b.kt, tile, b.scores, tile, false);
    for (std::int64_t r = 0; r < rows; ++r) {
      A* s = b.scores + r * tile;
      const std::int64_t valid = std::min(tile, first_position + r + 1 - t * tile);
      for (std::int64_t j = std::max<std::int64_t>(valid, 0); j < tile; ++j) s[j] = -std::numeric_limits<A>::infinity();
      V highest = V::load(s);
      for (std::int64_t j = V::lanes; j < tile; j += V::lanes) highest = max(highest, V::load(s + j));
      const A m = std::max(b.max[r], reduce_max(highest));
      const A shrink = exp(V(b.max[r] - m))[0];
      V total(A(0));
      for (std::int64_t j = 0; j < tile; j += V::lanes) {
        const V p = exp(V::load(s + j) - V(m));
        p.store(s + j);
        total = total + p;
      }
      b.sum[r] = b.sum[r] * shrink + reduce_add(total);
      b.max[r] = m;
      A* o = b.out + r * d_pad;
      for (std::int64_t j = 0; j < d_pad; j += V::lanes) (V::load(o + j) * V(shrink)).store(o + j);
    }
    load_tile(count, head_size, d_pad, values(t), v_stride, b.v);
    tile_gemm<A>(rows, d_pad, count, b.scores, tile, 1, b.v, d_pad, b.out, d_pad, true);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const A inverse = A(1) / b.sum[r];
    const A* o = b.out + r * d_pad;
    for (std::int64_t j = 0; j < head_size; ++j) out[r * out_stride + j] = static_cast<T>(o[j] * inverse);
    if (lse != nullptr) lse[r] = b.max[r] + std::log(b.sum[r]);
  }
}

template <class A>
Buffers<A> take_buffers(Context& context, std::int64_t head_size) {
  const std::int64_t d = pad(head_size, 16);
  const std::int64_t need = tile * d * 4 + tile * tile + tile * 2;
  A* p = static_cast<A*>(context.scratch(omp_get_thread_num(), static_cast<std::size_t>(need) * sizeof(A)));
  Buffers<A> b{};
  b.q = p, p += tile * d;
  b.kt = p, p += tile * d;
  b.v = p, p += tile * d;
  b.out = p, p += tile * d;
  b.scores = p, p += tile * tile;
  b.max = p, p += tile;
  b.sum = p;
  return b;
}

std::vector<RowTile> row_tiles(const std::int32_t* starts, std::int64_t sequences) {
  std::vector<RowTile> tiles;
  for (std::int64_t s = 0; s < sequences; ++s)
    for (std::int64_t r = 0; r < starts[s + 1] - starts[s]; r += tile) tiles.push_back({static_cast<std::int32_t>(s), r});
  // The last tiles of a sequence have the most keys: starting with them evens out the threads.
  std::stable_sort(tiles.begin(), tiles.end(), [](const RowTile& a, const RowTile& b) { return a.first > b.first; });
  return tiles;
}

}  // namespace

template <class T>
void attention_forward(Context& context, const AttentionArgs<T>& a) {
  using A = Compute<T>;
  const std::vector<RowTile> tiles = row_tiles(a.starts, a.sequences);
  const std::int64_t group = a.heads / a.kv_heads, items = static_cast<std::int64_t>(tiles.size()) * a.heads;
#pragma omp parallel num_threads(context.threads())
  {
    const Buffers<A> b = take_buffers<A>(context, a.head_size);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const RowTile& rt = tiles[static_cast<std::size_t>(item / a.heads)];
      const std::int64_t h = item % a.heads, begin = a.starts[rt.sequence], row = begin + rt.first;
      const std::int64_t rows = std::min(tile, a.starts[rt.sequence + 1] - row);
      const T* k = a.k + begin * a.k_stride + h / group * a.head_size;
      const T* v = a.v + begin * a.v_stride + h / group * a.head_size;
      query_tile<A, T>(b, rows, rt.first, a.head_size, a.scale, a.q + row * a.q_stride + h * a.head_size, a.q_stride,
                       [&](std::int64_t t) { return k + t * tile * a.k_stride; }, a.k_stride,
                       [&](std::int64_t t) { return v + t * tile * a.v_stride; }, a.v_stride,
                       a.out + row * a.out_stride + h * a.head_size, a.out_stride,
                       a.lse == nullptr ? nullptr : static_cast<A*>(a.lse) + h * a.rows + row);
    }
  }
}

template <class T>
void attention_paged(Context& context, const PagedAttentionArgs<T>& a) {
  using A = Compute<T>;
  const std::vector<RowTile> tiles = row_tiles(a.starts, a.sequences);
  const std::int64_t group = a.heads / a.kv_heads, items = static_cast<std::int64_t>(tiles.size()) * a.heads;
#pragma omp parallel num_threads(context.threads())
  {
    const Buffers<A> b = take_buffers<A>(context, a.head_size);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const RowTile& rt = tiles[static_cast<std::size_t>(item / a.heads)];
      const std::int64_t h = item % a.heads, row = a.starts[rt.sequence] + rt.first;
      const std::int64_t rows = std::min(tile, a.starts[rt.sequence + 1] - row);
      const std::int64_t past = a.lengths[rt.sequence] - (a.starts[rt.sequence + 1] - a.starts[rt.sequence]);
      const std::int32_t* blocks = a.blocks + rt.sequence * a.blocks_stride;
      auto page = [&](const T* pages, std::int64_t t) {
        return pages + (static_cast<std::int64_t>(blocks[t]) * a.kv_heads + h / group) * tile * a.head_size;
      };
      query_tile<A, T>(b, rows, past + rt.first, a.head_size, a.scale, a.q + row * a.q_stride + h * a.head_size, a.q_stride,
                       [&](std::int64_t t) { return page(a.k_pages, t); }, a.head_size,
                       [&](std::int64_t t) { return page(a.v_pages, t); }, a.head_size,
                       a.out + row * a.out_stride + h * a.head_size, a.out_stride, static_cast<A*>(nullptr));
    }
  }
}

template void attention_forward<double>(Context&, const AttentionArgs<double>&);
template void attention_forward<float>(Context&, const AttentionArgs<float>&);
template void attention_forward<bf16>(Context&, const AttentionArgs<bf16>&);
template void attention_paged<double>(Context&, const PagedAttentionArgs<double>&);
template void attention_paged<float>(Context&, const PagedAttentionArgs<float>&);
template void attention_paged<bf16>(Context&, const PagedAttentionArgs<bf16>&);

}  // namespace capstan::kernels::cpu
