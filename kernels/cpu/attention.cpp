// Tiled attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): scores exist for one
// 64 x 64 tile at a time. One row's arithmetic never depends on the other rows of its tile.
#include <kernels/cpu/ahead.h>
#include <kernels/cpu/attention.h>
#include <kernels/cpu/tile_gemm.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t tile = attention_tile, band = 16;

std::int64_t pad(std::int64_t n, std::int64_t lanes) { return (n + lanes - 1) / lanes * lanes; }

template <class A>
struct Buffers {
  A *q, *scores, *out, *max, *sum;
  A *keys, *values;  // packed tiles of one sequence and key/value head: keys transposed, both padded
};

/// One tile of query rows against the key tiles from its first row's first key on; tile `packed` is the first in b.keys.
template <class A, class T>
void query_tile(const Buffers<A>& b, std::int64_t packed, std::int64_t rows, std::int64_t first_position, std::int64_t window, std::int64_t head_size, double scale,
                const T* q, std::int64_t q_stride, T* out, std::int64_t out_stride, A* lse) {
  using V = Vec<A>;
  const std::int64_t d_pad = pad(head_size, V::lanes);
  load_tile(rows, head_size, head_size, q, q_stride, b.q);
  for (std::int64_t i = 0; i < rows * head_size; ++i) b.q[i] *= static_cast<A>(scale);
  std::fill(b.max, b.max + tile, -std::numeric_limits<A>::infinity());
  std::fill(b.sum, b.sum + tile, A(0));
  std::fill(b.out, b.out + rows * d_pad, A(0));
  constexpr A nothing = -std::numeric_limits<A>::infinity();
  const std::int64_t last_position = first_position + rows - 1, begin = first_seen(first_position, window) / tile;
  Ahead ahead;
  ahead.add(out, rows, head_size, out_stride);
  const std::int64_t steps = 22 * (last_position / tile + 1 - begin), portion = (rows + steps - 1) / steps;  // 22 a tile
  for (std::int64_t t = begin; t * tile <= last_position; ++t) {
    const A *keys = b.keys + (t - packed) * tile * head_size, *values = b.values + (t - packed) * tile * d_pad;
    const std::int64_t count = std::min(tile, last_position + 1 - t * tile);
    // On the diagonal, bands of 16 rows see only the keys up to their end; what is left out would be masked.
    const bool diagonal = t * tile == first_position;
    for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile)
      tile_gemm<A>(ahead, portion, std::min(diagonal ? band : tile, rows - r), diagonal ? r + band : tile, head_size, b.q + r * head_size, head_size, 1,
                   keys, tile, b.scores + r * tile, tile, false);
    // Three passes over the rows, so that the exponentials of one do not wait for the maximum of another. A row whose window
    // begins in a later tile has seen nothing yet: its exponentials are taken from 0 and are 0.
    A highest[tile], base[tile], shrink[tile];
    for (std::int64_t r = 0; r < rows; ++r) {
      A* s = b.scores + r * tile;
      const std::int64_t valid = std::clamp<std::int64_t>(first_position + r + 1 - t * tile, 0, tile);
      for (std::int64_t j = valid; j < tile; ++j) s[j] = nothing;
      const std::int64_t hidden = std::min(tile, first_seen(first_position + r, window) - t * tile);
      for (std::int64_t j = 0; j < hidden; ++j) s[j] = nothing;
      V m = V::load(s);
      for (std::int64_t j = V::lanes; j < tile; j += V::lanes) m = max(m, V::load(s + j));
      highest[r] = std::max(b.max[r], reduce_max(m));
      base[r] = highest[r] == nothing ? A(0) : highest[r];
    }
    for (std::int64_t r = rows; r < tile; ++r) base[r] = A(0);
    for (std::int64_t r = 0; r < rows; r += V::lanes) {
      const V f = exp_flushed(V::load(b.max + r) - V::load(base + r));
      f.store(shrink + r);
      (V::load(b.sum + r) * f).store(b.sum + r);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      A* s = b.scores + r * tile;
      const V m(base[r]);
      V total(A(0));
      for (std::int64_t j = 0; j < tile; j += V::lanes) {
        const V p = exp_flushed(V::load(s + j) - m);
        p.store(s + j);
        total = total + p;
      }
      b.sum[r] += reduce_add(total);
      b.max[r] = highest[r];
      if (shrink[r] == A(1) || t == begin) continue;  // times 1, or nothing there yet
      A* o = b.out + r * d_pad;
      for (std::int64_t j = 0; j < d_pad; j += V::lanes) (V::load(o + j) * V(shrink[r])).store(o + j);
    }
    for (std::int64_t r = 0; r < rows; r += diagonal ? band : tile)
      tile_gemm<A>(ahead, portion, std::min(diagonal ? band : tile, rows - r), d_pad, diagonal ? std::min(count, r + band) : count, b.scores + r * tile, tile, 1,
                   values, d_pad, b.out + r * d_pad, d_pad, true);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const A inverse = A(1) / b.sum[r];
    const A* o = b.out + r * d_pad;
    for (std::int64_t j = 0; j < head_size; ++j) out[r * out_stride + j] = static_cast<T>(o[j] * inverse);
    if (lse != nullptr) lse[r] = b.max[r] + std::log(b.sum[r]);
  }
}

/// Bytes of a thread's Buffers.
template <class A>
std::size_t buffers_need(std::int64_t head_size, std::int64_t most_tiles) {
  const std::int64_t d = pad(head_size, 16);
  return static_cast<std::size_t>(tile * d * 2 + tile * tile + tile * 2 + most_tiles * tile * (head_size + d)) * sizeof(A);
}

template <class A>
Buffers<A> take_buffers(Context& context, std::int64_t head_size, std::int64_t most_tiles) {
  const std::int64_t d = pad(head_size, 16);
  A* p = static_cast<A*>(context.scratch(omp_get_thread_num(), buffers_need<A>(head_size, most_tiles)));
  Buffers<A> b{};
  b.q = p, p += tile * d;
  b.out = p, p += tile * d;
  b.scores = p, p += tile * tile;
  b.max = p, p += tile;
  b.sum = p, p += tile;
  b.keys = p, p += most_tiles * tile * head_size;
  b.values = p;
  return b;
}

std::int64_t tiles_of(std::int64_t rows) { return (rows + tile - 1) / tile; }

/// Query tiles [first, end) of one sequence: what one thread does for one key/value head at a time.
struct Work { std::int64_t sequence, first, end; };

/// Packing the keys serves all query tiles of a piece, so pieces are as long as keeps the threads busy.
std::vector<Work> pieces(const std::int32_t* starts, std::int64_t sequences, std::int64_t kv_heads, int threads) {
  const std::int64_t cuts = std::max<std::int64_t>(1, 4 * threads / std::max<std::int64_t>(1, sequences * kv_heads));
  std::vector<Work> all;
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t n = tiles_of(starts[s + 1] - starts[s]), piece = (n + cuts - 1) / cuts;
    for (std::int64_t t = 0; t < n; t += piece) all.push_back({s, t, std::min(n, t + piece)});
  }
  // The last tiles of a sequence have the most keys: starting with them evens out the threads.
  std::stable_sort(all.begin(), all.end(), [](const Work& a, const Work& b) { return a.end > b.end; });
  return all;
}

}  // namespace

template <class T>
void attention_forward(Context& context, const AttentionArgs<T>& a) {
  using A = Compute<T>;
  const std::vector<Work> work = pieces(a.starts, a.sequences, a.kv_heads, context.threads());
  const std::int64_t group = a.heads / a.kv_heads, items = static_cast<std::int64_t>(work.size()) * a.kv_heads, d = a.head_size;
  const std::int64_t d_pad = pad(d, Vec<A>::lanes);
  const auto past_of = [&](std::int64_t s) { return a.key_count(s) - (a.starts[s + 1] - a.starts[s]); };
  const auto key_tiles = [&](const Work& w) { return tiles_of(std::min(a.key_count(w.sequence), past_of(w.sequence) + w.end * tile)); };
  std::int64_t most = 0;
  for (const Work& w : work) most = std::max(most, key_tiles(w) - first_seen(past_of(w.sequence) + w.first * tile, a.window) / tile);
  context.reserve_scratch(context.threads(), buffers_need<A>(d, most));
#pragma omp parallel num_threads(context.threads())
  {
    const Buffers<A> b = take_buffers<A>(context, d, most);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const Work& w = work[static_cast<std::size_t>(item / a.kv_heads)];
      const std::int64_t g = item % a.kv_heads, begin = a.starts[w.sequence], length = a.starts[w.sequence + 1] - begin;
      const std::int64_t held = a.key_count(w.sequence), past = past_of(w.sequence);
      const std::int64_t packed = first_seen(past + w.first * tile, a.window) / tile;
      for (std::int64_t t = packed; t < key_tiles(w); ++t) {
        const std::int64_t count = std::min(tile, held - t * tile), row = a.key_begin(w.sequence) + t * tile;
        load_tile_transposed(count, d, tile, a.k + row * a.k_stride + g * d, a.k_stride, b.keys + (t - packed) * tile * d);
        load_tile(count, d, d_pad, a.v + row * a.v_stride + g * d, a.v_stride, b.values + (t - packed) * tile * d_pad);
      }
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h)
        for (std::int64_t t = w.first; t < w.end; ++t) {
          const std::int64_t row = begin + t * tile;
          query_tile<A, T>(b, packed, std::min(tile, length - t * tile), past + t * tile, a.window, d, a.scale, a.q + row * a.q_stride + h * d, a.q_stride,
                           a.out + row * a.out_stride + h * d, a.out_stride,
                           a.lse == nullptr ? nullptr : static_cast<A*>(a.lse) + h * a.rows + row);
        }
    }
  }
}

template <class T>
void attention_paged(Context& context, const PagedAttentionArgs<T>& a) {
  using A = Compute<T>;
  const std::vector<Work> work = pieces(a.starts, a.sequences, a.kv_heads, context.threads());
  const std::int64_t group = a.heads / a.kv_heads, items = static_cast<std::int64_t>(work.size()) * a.kv_heads, d = a.head_size;
  const std::int64_t d_pad = pad(d, Vec<A>::lanes);
  std::int64_t most = 0;
  for (const Work& w : work) {
    const std::int64_t held = a.lengths[w.sequence], past = held - (a.starts[w.sequence + 1] - a.starts[w.sequence]);
    most = std::max(most, tiles_of(std::min(held, past + w.end * tile)) - first_seen(past + w.first * tile, a.window) / tile);
  }
  context.reserve_scratch(context.threads(), buffers_need<A>(d, most));
#pragma omp parallel num_threads(context.threads())
  {
    const Buffers<A> b = take_buffers<A>(context, d, most);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < items; ++item) {
      const Work& w = work[static_cast<std::size_t>(item / a.kv_heads)];
      const std::int64_t g = item % a.kv_heads, begin = a.starts[w.sequence], fresh = a.starts[w.sequence + 1] - begin;
      const std::int64_t held = a.lengths[w.sequence], past = held - fresh;
      const std::int32_t* blocks = a.blocks + w.sequence * a.blocks_stride;
      const std::int64_t last = std::min(held, past + w.end * tile);  // keys that this piece's rows can see
      const std::int64_t packed = first_seen(past + w.first * tile, a.window) / tile;
      for (std::int64_t t = packed; t < tiles_of(last); ++t) {
        const std::int64_t count = std::min(tile, held - t * tile), at = (static_cast<std::int64_t>(blocks[t]) * a.kv_heads + g) * tile * d;
        load_tile_transposed(count, d, tile, a.k_pages + at, d, b.keys + (t - packed) * tile * d);
        load_tile(count, d, d_pad, a.v_pages + at, d, b.values + (t - packed) * tile * d_pad);
      }
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h)
        for (std::int64_t t = w.first; t < w.end; ++t) {
          const std::int64_t row = begin + t * tile;
          query_tile<A, T>(b, packed, std::min(tile, fresh - t * tile), past + t * tile, a.window, d, a.scale, a.q + row * a.q_stride + h * d, a.q_stride,
                           a.out + row * a.out_stride + h * d, a.out_stride, static_cast<A*>(nullptr));
        }
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
