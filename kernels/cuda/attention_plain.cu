// Attention without tensor cores, for f32 and f64: the reference on this device, and what f32 recipes run. Small tiles,
// an online softmax, tiles of keys counted from the sequence's start; backward in two kernels without atomics.
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_tile.cuh>

namespace capstan::kernels::cuda {

namespace {

template <class T>
struct PlainArguments {
  const T *q, *k, *v, *dout;
  T *out, *dq, *dk, *dv;
  std::int64_t q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride, dkv_stride, rows;
  int heads, kv_heads, head_size, sequences, tiles;
  int length, past;  // where starts is null: rows, and keys ahead of them
  T scale;
  Window window;
  const std::int32_t* starts;
  T *lse;
  const T* delta;
  const std::int32_t *blocks, *lengths;
  std::int64_t blocks_stride;
  int page;
};

/// Rows [0, count) of `size` elements into shared rows of Width + 1; the rest is zero.
template <int Tile, int Width, class T>
__device__ __forceinline__ void load_plain(T* to, const T* from, std::int64_t stride, int count, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile * Width; i += 256) {
    const int r = i / Width, c = i % Width;
    to[r * (Width + 1) + c] = r < count && c < size ? from[r * stride + c] : T(0);
  }
}

/// Over the Lanes neighbouring threads of one row.
template <int Lanes, class A, class Op>
__device__ __forceinline__ A lanes_reduce(A x, Op op) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

template <class T, int Tile, int Width, bool Paged>
__global__ void __launch_bounds__(256, 2) plain_forward_kernel(const __grid_constant__ PlainArguments<T> a) {
  constexpr int lanes = 256 / Tile, per = Tile / lanes, columns = Width / lanes, row_size = Width + 1;
  unsigned char* shared = dynamic_shared();
  T* q = reinterpret_cast<T*>(shared);
  T *k = q + Tile * row_size, *v = k + Tile * row_size, *p = v + Tile * row_size;
  const int r = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length, a.tiles - 1 - static_cast<int>(blockIdx.y), Tile);
  if (found.length == 0) return;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (a.heads / a.kv_heads), d = a.head_size;
  const int first = found.tile * Tile, live = min(Tile, found.length - first);
  const int held = Paged ? a.lengths[found.sequence] : found.length + a.past, past = held - found.length, position = past + first + r;
  load_plain<Tile, Width>(q, a.q + static_cast<std::int64_t>(found.begin + first) * a.q_stride + head * d, a.q_stride, live, d);
  T o[columns] = {}, top = lowest<T>(), sum = 0;
  const int key_tiles = (past + first + live - 1) / Tile + 1;
  for (int t = a.window.first_tile(past + first, Tile); t < key_tiles; ++t) {
    const int count = min(Tile, held - t * Tile);
    const T *from_k, *from_v;
    std::int64_t k_stride = a.k_stride, v_stride = a.v_stride;
    if constexpr (Paged) {
      const std::int64_t page = a.blocks[found.sequence * a.blocks_stride + t * Tile / a.page];
      const std::int64_t at = ((page * a.kv_heads + kv_head) * a.page + t * Tile % a.page) * d;
      from_k = a.k + at, from_v = a.v + at, k_stride = v_stride = d;
    } else {
      from_k = a.k + static_cast<std::int64_t>(found.begin + t * Tile) * k_stride + kv_head * d;
      from_v = a.v + static_cast<std::int64_t>(found.begin + t * Tile) * v_stride + kv_head * d;
    }
    __syncthreads();
    load_plain<Tile, Width>(k, from_k, k_stride, count, d);
    load_plain<Tile, Width>(v, from_v, v_stride, count, d);
    __syncthreads();
    T s[per], m = top;
#pragma unroll
    for (int j = 0; j < per; ++j) s[j] = 0;
    for (int c = 0; c < d; ++c) {
      const T x = q[r * row_size + c];
#pragma unroll
      for (int j = 0; j < per; ++j) s[j] += x * k[(lane + j * lanes) * row_size + c];
    }
#pragma unroll
    for (int j = 0; j < per; ++j) {
      s[j] = a.window.hides(position - (t * Tile + lane + j * lanes)) ? lowest<T>() : s[j] * a.scale;
      m = Max{}(m, s[j]);
    }
    m = lanes_reduce<lanes>(m, Max{});
    const T shrink = top == m ? T(1) : exp_of(top - m);
    const T base = m > lowest<T>() ? m : T(0);  // a row that has seen no key yet: exponentials of it are 0
    T total = 0;
#pragma unroll
    for (int j = 0; j < per; ++j) {
      const T e = exp_of(s[j] - base);
      p[r * (Tile + 1) + lane + j * lanes] = e;
      total += e;
    }
    sum = sum * shrink + lanes_reduce<lanes>(total, Sum{});
    top = m;
    __syncwarp();  // a row's threads are of one warp
#pragma unroll
    for (int c = 0; c < columns; ++c) o[c] *= shrink;
    for (int j = 0; j < Tile; ++j) {
      const T e = p[r * (Tile + 1) + j];
#pragma unroll
      for (int c = 0; c < columns; ++c) o[c] += e * v[j * row_size + lane + c * lanes];
    }
  }
  if (r >= live) return;
  const T inverse = T(1) / sum;
  T* to = a.out + static_cast<std::int64_t>(found.begin + first + r) * a.out_stride + head * d;
#pragma unroll
  for (int c = 0; c < columns; ++c)
    if (lane + c * lanes < d) to[lane + c * lanes] = o[c] * inverse;
  if (!Paged && a.lse != nullptr && lane == 0) a.lse[head * a.rows + found.begin + first + r] = top + log_of(sum);
}

/// Probabilities and score gradients of one tile of queries and keys: p[query, key], g[query, key].
template <class T, int Tile, int Width>
__device__ __forceinline__ void plain_scores(const PlainArguments<T>& a, const T* q, const T* dout, const T* k, const T* v, T* p, T* g, int head, std::int64_t row,
                                             int first_query, int queries, int first_key) {
  constexpr int lanes = 256 / Tile, per = Tile / lanes, row_size = Width + 1;
  const int r = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const bool valid = r < queries;
  const T lse = valid ? a.lse[head * a.rows + row + r] : T(0), delta = valid ? a.delta[head * a.rows + row + r] : T(0);
  T s[per], x[per];
#pragma unroll
  for (int j = 0; j < per; ++j) s[j] = x[j] = 0;
  for (int c = 0; c < a.head_size; ++c) {
    const T at_q = q[r * row_size + c], at_d = dout[r * row_size + c];
#pragma unroll
    for (int j = 0; j < per; ++j) s[j] += at_q * k[(lane + j * lanes) * row_size + c], x[j] += at_d * v[(lane + j * lanes) * row_size + c];
  }
#pragma unroll
  for (int j = 0; j < per; ++j) {
    const int key = lane + j * lanes;
    const T e = valid && !a.window.hides(first_query + r - first_key - key) ? exp_of(s[j] * a.scale - lse) : T(0);
    p[r * (Tile + 1) + key] = e;
    g[r * (Tile + 1) + key] = e * (x[j] - delta) * a.scale;
  }
}

template <class T, int Tile, int Width>
__global__ void __launch_bounds__(256, 2) plain_dkv_kernel(const __grid_constant__ PlainArguments<T> a) {
  constexpr int lanes = 256 / Tile, columns = Width / lanes, row_size = Width + 1;
  unsigned char* shared = dynamic_shared();
  T* q = reinterpret_cast<T*>(shared);
  T *k = q + Tile * row_size, *v = k + Tile * row_size, *dout = v + Tile * row_size, *p = dout + Tile * row_size, *g = p + Tile * (Tile + 1);
  const int r = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length + a.past, static_cast<int>(blockIdx.y), Tile);  // of keys
  if (found.length == 0) return;
  const int rows = found.length - a.past, kv_head = static_cast<int>(blockIdx.x), group = a.heads / a.kv_heads, d = a.head_size;
  const int first = found.tile * Tile, live = min(Tile, found.length - first);
  const std::int64_t at = found.begin + first;
  load_plain<Tile, Width>(k, a.k + at * a.k_stride + kv_head * d, a.k_stride, live, d);
  load_plain<Tile, Width>(v, a.v + at * a.v_stride + kv_head * d, a.v_stride, live, d);
  T dk[columns] = {}, dv[columns] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int q0 = max(0, first - a.past) / Tile * Tile, end = a.window.end(first + live - 1, found.length) - a.past; q0 < end; q0 += Tile) {
      const int queries = min(Tile, rows - q0);
      const std::int64_t row = found.begin + q0;
      __syncthreads();
      load_plain<Tile, Width>(q, a.q + row * a.q_stride + head * d, a.q_stride, queries, d);
      load_plain<Tile, Width>(dout, a.dout + row * a.dout_stride + head * d, a.dout_stride, queries, d);
      __syncthreads();
      plain_scores<T, Tile, Width>(a, q, dout, k, v, p, g, head, row, a.past + q0, queries, first);
      __syncthreads();
      for (int i = 0; i < queries; ++i) {  // this thread's key is r
        const T e = p[i * (Tile + 1) + r], s = g[i * (Tile + 1) + r];
#pragma unroll
        for (int c = 0; c < columns; ++c) dv[c] += e * dout[i * row_size + lane + c * lanes], dk[c] += s * q[i * row_size + lane + c * lanes];
      }
    }
  if (r >= live) return;
  const std::int64_t to = (at + r) * a.dkv_stride + kv_head * d;
#pragma unroll
  for (int c = 0; c < columns; ++c)
    if (lane + c * lanes < d) {
      T &key = a.dk[to + lane + c * lanes], &value = a.dv[to + lane + c * lanes];
      key = a.starts != nullptr ? dk[c] : key + dk[c], value = a.starts != nullptr ? dv[c] : value + dv[c];
    }
}

template <class T, int Tile, int Width>
__global__ void __launch_bounds__(256, 2) plain_dq_kernel(const __grid_constant__ PlainArguments<T> a) {
  constexpr int lanes = 256 / Tile, columns = Width / lanes, row_size = Width + 1;
  unsigned char* shared = dynamic_shared();
  T* q = reinterpret_cast<T*>(shared);
  T *k = q + Tile * row_size, *v = k + Tile * row_size, *dout = v + Tile * row_size, *p = dout + Tile * row_size, *g = p + Tile * (Tile + 1);
  const int r = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length, a.tiles - 1 - static_cast<int>(blockIdx.y), Tile);
  if (found.length == 0) return;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (a.heads / a.kv_heads), d = a.head_size;
  const int first = found.tile * Tile, live = min(Tile, found.length - first), held = found.length + a.past, position = a.past + first;
  const std::int64_t row = found.begin + first;
  load_plain<Tile, Width>(q, a.q + row * a.q_stride + head * d, a.q_stride, live, d);
  load_plain<Tile, Width>(dout, a.dout + row * a.dout_stride + head * d, a.dout_stride, live, d);
  T dq[columns] = {};
  for (int t = a.window.first_tile(position, Tile); t * Tile < position + live; ++t) {
    const int count = min(Tile, held - t * Tile);
    const std::int64_t at = found.begin + t * Tile;
    __syncthreads();
    load_plain<Tile, Width>(k, a.k + at * a.k_stride + kv_head * d, a.k_stride, count, d);
    load_plain<Tile, Width>(v, a.v + at * a.v_stride + kv_head * d, a.v_stride, count, d);
    __syncthreads();
    plain_scores<T, Tile, Width>(a, q, dout, k, v, p, g, head, row, position, live, t * Tile);
    __syncwarp();
    for (int j = 0; j < Tile; ++j) {
      const T s = g[r * (Tile + 1) + j];
#pragma unroll
      for (int c = 0; c < columns; ++c) dq[c] += s * k[j * row_size + lane + c * lanes];
    }
  }
  if (r >= live) return;
  T* to = a.dq + (row + r) * a.dq_stride + head * d;
#pragma unroll
  for (int c = 0; c < columns; ++c)
    if (lane + c * lanes < d) to[lane + c * lanes] = dq[c];
}

/// f.operator()<T, Tile, Width>().
template <class F>
void by_shape(Num num, int width, F&& f) {
  const auto widths = [&]<class T, int Tile>() {
    if (width == 64) f.template operator()<T, Tile, 64>();
    else if (width == 128) f.template operator()<T, Tile, 128>();
    else f.template operator()<T, Tile, 256>();
  };
  if (num == Num::f64) widths.template operator()<double, 16>();
  else widths.template operator()<float, 32>();
}

template <class T, class A>
PlainArguments<T> shape_of(const A& a, int tile) {
  PlainArguments<T> p{};
  p.q = static_cast<const T*>(a.q), p.out = static_cast<T*>(a.out), p.q_stride = a.q_stride, p.out_stride = a.out_stride, p.rows = a.rows;
  p.heads = static_cast<int>(a.heads), p.kv_heads = static_cast<int>(a.kv_heads), p.head_size = static_cast<int>(a.head_size);
  p.sequences = static_cast<int>(a.sequences), p.scale = static_cast<T>(a.scale), p.window = window_of(a.window), p.starts = a.starts;
  p.tiles = static_cast<int>(attention_tiles(a.host_starts, a.sequences, a.rows, tile));
  return p;
}

template <class T>
void add_space(PlainArguments<T>& p, const Attention& a) {
  p.k = static_cast<const T*>(a.k), p.v = static_cast<const T*>(a.v), p.k_stride = a.k_stride, p.v_stride = a.v_stride;
  p.lse = static_cast<T*>(a.lse), p.length = rows_of_one(a), p.past = keys_ahead_of_one(a);
}

}  // namespace

void attention_forward_plain(Context& ctx, const Attention& a) {
  const PlainAttentionPlan plan = plan_plain_attention(a.head_size, a.num == Num::f64 ? 8 : 4, false);
  by_shape(a.num, plan.width, [&]<class T, int Tile, int Width>() {
    PlainArguments<T> p = shape_of<T>(a, Tile);
    add_space(p, a);
    const Launch l{static_cast<unsigned>(a.heads), static_cast<unsigned>(p.tiles), 1, 256, static_cast<unsigned>(plan.shared_bytes)};
    launch(ctx, l, "attention", plain_forward_kernel<T, Tile, Width, false>, p);
  });
}

void attention_paged_plain(Context& ctx, const PagedAttention& a) {
  const PlainAttentionPlan plan = plan_plain_attention(a.head_size, a.num == Num::f64 ? 8 : 4, false);
  by_shape(a.num, plan.width, [&]<class T, int Tile, int Width>() {
    PlainArguments<T> p = shape_of<T>(a, Tile);
    p.k = static_cast<const T*>(a.k_pages), p.v = static_cast<const T*>(a.v_pages);
    p.blocks = a.blocks, p.lengths = a.lengths, p.blocks_stride = a.blocks_stride, p.page = static_cast<int>(a.page);
    const Launch l{static_cast<unsigned>(a.heads), static_cast<unsigned>(p.tiles), 1, 256, static_cast<unsigned>(plan.shared_bytes)};
    launch(ctx, l, "attention_paged", plain_forward_kernel<T, Tile, Width, true>, p);
  });
}

void attention_backward_plain(Context& ctx, const Attention& a, const void* delta) {
  const PlainAttentionPlan plan = plan_plain_attention(a.head_size, a.num == Num::f64 ? 8 : 4, true);
  by_shape(a.num, plan.width, [&]<class T, int Tile, int Width>() {
    PlainArguments<T> p = shape_of<T>(a, Tile);
    add_space(p, a);
    p.dout = static_cast<const T*>(a.dout), p.dq = static_cast<T*>(a.dq), p.dk = static_cast<T*>(a.dk), p.dv = static_cast<T*>(a.dv);
    p.dout_stride = a.dout_stride, p.dq_stride = a.dq_stride, p.dkv_stride = a.dkv_stride, p.delta = static_cast<const T*>(delta);
    const auto tiles = static_cast<unsigned>(p.tiles), shared = static_cast<unsigned>(plan.shared_bytes);
    const unsigned key_tiles = a.starts != nullptr ? tiles : static_cast<unsigned>((a.host_key_counts[0] + Tile - 1) / Tile);
    launch(ctx, Launch{static_cast<unsigned>(a.kv_heads), key_tiles, 1, 256, shared}, "attention_backward dk dv", plain_dkv_kernel<T, Tile, Width>, p);
    launch(ctx, Launch{static_cast<unsigned>(a.heads), tiles, 1, 256, shared}, "attention_backward dq", plain_dq_kernel<T, Tile, Width>, p);
  });
}

}  // namespace capstan::kernels::cuda
