// The gradient of attention on tensor cores (bf16), without atomics: scores are rebuilt from the saved log-sum-exp (Dao
// 2023), once by tiles of keys for dk and dv, once by tiles of queries for dq. That is seven products where atomics would
// need five, and every sum has one order.
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_tile.cuh>

namespace capstan::kernels::cuda {

namespace {

struct BackwardArguments {
  const bf16 *q, *k, *v, *dout;
  bf16 *dq, *dk, *dv;
  std::int64_t q_stride, k_stride, v_stride, dout_stride, dq_stride, dkv_stride, rows;
  int heads, kv_heads, head_size, sequences, tiles;
  int length, past;  // where starts is null: rows, and keys ahead of them
  float scale;
  Window window;
  const std::int32_t* starts;
  const float *lse, *delta;
  bool vector;
};

/// One tile of 64 keys of one key/value head; over its query heads and, for each, over the tiles of queries that see it.
/// Warps own strips of 16 keys; with two column parts, two warps share a strip and each keeps half of the columns.
template <int Width, int Parts>
__global__ void __launch_bounds__(128 * Parts, Parts == 1 ? 2 : 1) attention_dkv_kernel(const __grid_constant__ BackwardArguments a) {
  constexpr int threads = 128 * Parts, keys = attention_keys, queries = 64, columns = Width / 8 / Parts;
  constexpr int tile_bytes = 64 * TileOf<Width>::row_bytes;
  unsigned char* shared = dynamic_shared();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int strip = warp % 4 * 16, part = warp / 4, group = a.heads / a.kv_heads, kv_head = static_cast<int>(blockIdx.x);
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length + a.past, static_cast<int>(blockIdx.y), keys);
  if (found.length == 0) return;
  const int first = found.tile * keys, live = min(keys, found.length - first);
  const unsigned k_tile = shared_address(shared), v_tile = k_tile + tile_bytes, q_tile = v_tile + tile_bytes, d_tile = q_tile + 2 * tile_bytes;
  float* numbers = reinterpret_cast<float*>(shared + 6 * tile_bytes);  // two stages of log-sum-exps and deltas
  load_rows<keys, Width, threads>(k_tile, a.head_size, a.vector, [&](int r) {
    return r < live ? a.k + static_cast<std::int64_t>(found.begin + first + r) * a.k_stride + kv_head * a.head_size : nullptr;
  });
  load_rows<keys, Width, threads>(v_tile, a.head_size, a.vector, [&](int r) {
    return r < live ? a.v + static_cast<std::int64_t>(found.begin + first + r) * a.v_stride + kv_head * a.head_size : nullptr;
  });
  const int first_query = max(0, first - a.past) / queries;  // tiles of rows from here see these keys
  const int query_tiles = (a.window.end(first + live - 1, found.length) - a.past + queries - 1) / queries - first_query, steps = query_tiles * group;
  if (steps <= 0) return;  // there is nothing to add
  const auto load_queries = [&](int step) {
    const int head = kv_head * group + step / query_tiles, row = (first_query + step % query_tiles) * queries;
    const int count = min(queries, found.length - a.past - row);
    const unsigned stage = static_cast<unsigned>(step % 2 * tile_bytes);
    const std::int64_t at = found.begin + row;
    load_rows<queries, Width, threads>(q_tile + stage, a.head_size, a.vector,
                                       [&](int r) { return r < count ? a.q + (at + r) * a.q_stride + head * a.head_size : nullptr; });
    load_rows<queries, Width, threads>(d_tile + stage, a.head_size, a.vector,
                                       [&](int r) { return r < count ? a.dout + (at + r) * a.dout_stride + head * a.head_size : nullptr; });
    commit_copies();
    const int r = static_cast<int>(threadIdx.x);
    if (r < queries) {
      float* to = numbers + step % 2 * 2 * queries;
      const bool valid = r < count;
      // A row that does not exist has probability 0 everywhere.
      to[r] = valid ? a.lse[head * a.rows + at + r] * 1.4426950408889634f : __int_as_float(0x7f800000);
      to[queries + r] = valid ? a.delta[head * a.rows + at + r] : 0.0f;
    }
  };
  load_queries(0);
  const LaneOffsets offsets(lane, TileOf<Width>::row_bytes);
  const unsigned strip_bytes = static_cast<unsigned>(strip * TileOf<Width>::row_bytes);
  float dk[1][columns][4] = {}, dv[1][columns][4] = {};
  const float scale2 = a.scale * 1.4426950408889634f;
  for (int step = 0; step < steps; ++step) {
    wait_copies<0>();
    __syncthreads();
    if (step + 1 < steps) load_queries(step + 1);
    const unsigned stage = static_cast<unsigned>(step % 2 * tile_bytes);
    const float* lse = numbers + step % 2 * 2 * queries;
    float p[1][queries / 8][4] = {}, g[1][queries / 8][4] = {};
    product_rows<Width, 1, queries / 8>(p, k_tile + strip_bytes, q_tile + stage, offsets);  // [keys, queries]
    const int apart = a.past + (first_query + step % query_tiles) * queries - first;
    const bool masked = apart < keys - 1 || a.window.cuts(apart + queries - 1);
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int query = n * 8 + lane % 4 * 2 + j % 2, key = strip + lane / 4 + j / 2 * 8;
        const float e = exp2_fast(fmaf(p[0][n][j], scale2, -lse[query]));
        p[0][n][j] = masked && a.window.hides(apart + query - key) ? 0.0f : e;
      }
    unsigned left[1][queries / 16][4];
    pack_left<queries / 8>(left[0], p[0]);
    product_columns<Width, 1, queries / 16, columns>(dv, left, d_tile + stage, part * columns, offsets);
    product_rows<Width, 1, queries / 8>(g, v_tile + strip_bytes, d_tile + stage, offsets);
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) g[0][n][j] = p[0][n][j] * (g[0][n][j] - lse[queries + n * 8 + lane % 4 * 2 + j % 2]);
    pack_left<queries / 8>(left[0], g[0]);
    product_columns<Width, 1, queries / 16, columns>(dk, left, q_tile + stage, part * columns, offsets);
  }
  __syncthreads();  // the key tile becomes the stage through which results leave
  const auto target = [&](bf16* to) {
    return [=](int r) -> bf16* {
      return strip + r < live ? to + static_cast<std::int64_t>(found.begin + first + strip + r) * a.dkv_stride + kv_head * a.head_size : nullptr;
    };
  };
  store_strip<Width, columns>(dk[0], a.scale, a.scale, shared, strip, part * columns, a.head_size, a.vector, lane, target(a.dk), a.starts == nullptr);
  store_strip<Width, columns>(dv[0], 1.0f, 1.0f, shared + tile_bytes, strip, part * columns, a.head_size, a.vector, lane, target(a.dv), a.starts == nullptr);
}

/// One tile of 64 queries of one head, over the tiles of keys that it sees.
template <int Width>
__global__ void __launch_bounds__(128, Width <= 128 ? 2 : 1) attention_dq_kernel(const __grid_constant__ BackwardArguments a) {
  constexpr int threads = 128, keys = attention_keys, queries = 64, columns = Width / 8, tile_bytes = 64 * TileOf<Width>::row_bytes;
  unsigned char* shared = dynamic_shared();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, strip = warp * 16;
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (a.heads / a.kv_heads);
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length, a.tiles - 1 - static_cast<int>(blockIdx.y), queries);
  if (found.length == 0) return;
  const int first = found.tile * queries, live = min(queries, found.length - first);
  const unsigned q_tile = shared_address(shared), d_tile = q_tile + tile_bytes, k_tile = d_tile + tile_bytes, v_tile = k_tile + 2 * tile_bytes;
  load_rows<queries, Width, threads>(q_tile, a.head_size, a.vector, [&](int r) {
    return r < live ? a.q + static_cast<std::int64_t>(found.begin + first + r) * a.q_stride + head * a.head_size : nullptr;
  });
  load_rows<queries, Width, threads>(d_tile, a.head_size, a.vector, [&](int r) {
    return r < live ? a.dout + static_cast<std::int64_t>(found.begin + first + r) * a.dout_stride + head * a.head_size : nullptr;
  });
  const auto load_keys = [&](int t) {
    const int count = min(keys, found.length + a.past - t * keys);
    const unsigned stage = static_cast<unsigned>(t % 2 * tile_bytes);
    const std::int64_t at = found.begin + t * keys;
    load_rows<keys, Width, threads>(k_tile + stage, a.head_size, a.vector,
                                    [&](int r) { return r < count ? a.k + (at + r) * a.k_stride + kv_head * a.head_size : nullptr; });
    load_rows<keys, Width, threads>(v_tile + stage, a.head_size, a.vector,
                                    [&](int r) { return r < count ? a.v + (at + r) * a.v_stride + kv_head * a.head_size : nullptr; });
    commit_copies();
  };
  const int position = a.past + first, first_tile = a.window.first_tile(position, keys), key_tiles = (position + live - 1) / keys + 1;
  load_keys(first_tile);
  const LaneOffsets offsets(lane, TileOf<Width>::row_bytes);
  const unsigned strip_bytes = static_cast<unsigned>(strip * TileOf<Width>::row_bytes);
  float dq[1][columns][4] = {}, lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = strip + lane / 4 + half * 8;
    const std::int64_t at = head * a.rows + found.begin + first + r;
    lse[half] = r < live ? a.lse[at] * 1.4426950408889634f : __int_as_float(0x7f800000);
    delta[half] = r < live ? a.delta[at] : 0.0f;
  }
  const float scale2 = a.scale * 1.4426950408889634f;
  for (int t = first_tile; t < key_tiles; ++t) {
    wait_copies<0>();
    __syncthreads();
    if (t + 1 < key_tiles) load_keys(t + 1);
    const unsigned stage = static_cast<unsigned>(t % 2 * tile_bytes);
    float p[1][keys / 8][4] = {}, g[1][keys / 8][4] = {};
    product_rows<Width, 1, keys / 8>(p, q_tile + strip_bytes, k_tile + stage, offsets);
    product_rows<Width, 1, keys / 8>(g, d_tile + strip_bytes, v_tile + stage, offsets);
    const int apart = position - t * keys;
    const bool masked = apart < keys - 1 || a.window.cuts(apart + queries - 1);
#pragma unroll
    for (int n = 0; n < keys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = n * 8 + lane % 4 * 2 + j % 2, query = strip + lane / 4 + j / 2 * 8;
        const float e = exp2_fast(fmaf(p[0][n][j], scale2, -lse[j / 2]));
        p[0][n][j] = masked && a.window.hides(apart + query - key) ? 0.0f : e * (g[0][n][j] - delta[j / 2]);
      }
    unsigned left[1][keys / 16][4];
    pack_left<keys / 8>(left[0], p[0]);
    product_columns<Width, 1, keys / 16, columns>(dq, left, k_tile + stage, 0, offsets);
  }
  __syncthreads();
  store_strip<Width, columns>(dq[0], a.scale, a.scale, shared, strip, 0, a.head_size, a.vector, lane, [&](int r) -> bf16* {
    return strip + r < live ? a.dq + static_cast<std::int64_t>(found.begin + first + strip + r) * a.dq_stride + head * a.head_size : nullptr;
  });
}

/// A warp takes one (row, head).
template <class T>
__global__ void attention_delta_kernel(std::int64_t rows, int heads, int head_size, const T* __restrict__ out, std::int64_t out_stride,
                                       const T* __restrict__ dout, std::int64_t dout_stride, Compute<T>* __restrict__ delta, bool vector) {
  using C = Compute<T>;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const std::int64_t row = at / heads;
  const int h = static_cast<int>(at % heads), lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  const T *o = out + row * out_stride + h * head_size, *g = dout + row * dout_stride + h * head_size;
  C sum = 0;
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  if (vector) {
    for (int c = lane * width; c < head_size; c += 32 * width) {
      const Pack<T, width> a = load_pack<T, width>(o + c), b = load_pack<T, width>(g + c);
#pragma unroll
      for (int i = 0; i < width; ++i) sum += widen(a.v[i]) * widen(b.v[i]);
    }
  } else {
    for (int c = lane; c < head_size; c += 32) sum += widen(o[c]) * widen(g[c]);
  }
  sum = warp_reduce(sum, Sum{});
  if (lane == 0) delta[h * rows + row] = sum;
}

}  // namespace

void attention_delta(Context& ctx, const Attention& a, void* delta) {
  visit(a.num, [&]<class T>() {
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    const bool vector = (a.head_size | a.out_stride | a.dout_stride) % width == 0 && all_on_16(a.out, a.dout);
    const Launch l{static_cast<unsigned>(ceil_div(a.rows * a.heads, 8)), 1, 1, 256, 0};
    launch(ctx, l, "attention_delta", attention_delta_kernel<T>, a.rows, static_cast<int>(a.heads), static_cast<int>(a.head_size), static_cast<const T*>(a.out),
           a.out_stride, static_cast<const T*>(a.dout), a.dout_stride, static_cast<Compute<T>*>(delta), vector);
  });
}

void attention_backward_tensor(Context& ctx, const Attention& a, const void* delta) {
  BackwardArguments b{};
  b.q = static_cast<const bf16*>(a.q), b.k = static_cast<const bf16*>(a.k), b.v = static_cast<const bf16*>(a.v), b.dout = static_cast<const bf16*>(a.dout);
  b.dq = static_cast<bf16*>(a.dq), b.dk = static_cast<bf16*>(a.dk), b.dv = static_cast<bf16*>(a.dv);
  b.q_stride = a.q_stride, b.k_stride = a.k_stride, b.v_stride = a.v_stride, b.dout_stride = a.dout_stride;
  b.dq_stride = a.dq_stride, b.dkv_stride = a.dkv_stride, b.rows = a.rows;
  b.heads = static_cast<int>(a.heads), b.kv_heads = static_cast<int>(a.kv_heads), b.head_size = static_cast<int>(a.head_size);
  b.sequences = static_cast<int>(a.sequences), b.scale = static_cast<float>(a.scale), b.window = window_of(a.window), b.starts = a.starts;
  b.lse = static_cast<const float*>(a.lse), b.delta = static_cast<const float*>(delta);
  b.length = rows_of_one(a), b.past = keys_ahead_of_one(a);
  b.tiles = static_cast<int>(attention_tiles(a.host_starts, a.sequences, a.rows, 64));
  b.vector = (a.head_size | a.q_stride | a.k_stride | a.v_stride | a.dout_stride | a.dq_stride | a.dkv_stride) % 8 == 0 &&
             all_on_16(a.q, a.k, a.v, a.dout, a.dq, a.dk, a.dv);
  const AttentionPlan dkv = plan_attention_dkv(a.head_size), dq = plan_attention_dq(a.head_size);
  const auto tiles = static_cast<unsigned>(b.tiles);
  const unsigned key_tiles = a.starts != nullptr ? tiles : static_cast<unsigned>((a.host_key_counts[0] + 63) / 64);
  const Launch keys{static_cast<unsigned>(a.kv_heads), key_tiles, 1, static_cast<unsigned>(dkv.warps * 32), static_cast<unsigned>(dkv.shared_bytes)};
  const Launch queries{static_cast<unsigned>(a.heads), tiles, 1, static_cast<unsigned>(dq.warps * 32), static_cast<unsigned>(dq.shared_bytes)};
  const auto run = [&]<int Width>() {
    launch(ctx, keys, "attention_backward dk dv", attention_dkv_kernel<Width, Width <= 128 ? 1 : 2>, b);
    launch(ctx, queries, "attention_backward dq", attention_dq_kernel<Width>, b);
  };
  switch (dkv.width) {
    case 32: run.template operator()<32>(); break;
    case 64: run.template operator()<64>(); break;
    case 96: run.template operator()<96>(); break;
    case 128: run.template operator()<128>(); break;
    case 192: run.template operator()<192>(); break;
    default: run.template operator()<256>(); break;
  }
}

}  // namespace capstan::kernels::cuda
