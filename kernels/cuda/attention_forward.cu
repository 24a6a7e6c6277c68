// Attention forward on tensor cores (bf16): tiles of queries against tiles of 64 keys with an online softmax (Milakov &
// Gimelshein 2018; Dao 2023). Keys come from the packed space or from pages; with pages the query heads that share a
// key/value head are rows of one tile, so that decoding reads keys once.
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_tile.cuh>

namespace capstan::kernels::cuda {

namespace {

struct ForwardArguments {
  const bf16 *q, *k, *v;
  bf16* out;
  std::int64_t q_stride, k_stride, v_stride, out_stride, rows;
  int heads, kv_heads, head_size, sequences, tiles;
  int length, past;  // where starts is null: rows, and keys ahead of them
  float scale;
  Window window;
  const std::int32_t* starts;
  float* lse;
  bool vector;
  // Pages:
  const std::int32_t *blocks, *lengths;
  std::int64_t blocks_stride;
  int page;
};

template <int Width, int Strips, bool Paged>
__device__ __forceinline__ void attention_forward_tile(const ForwardArguments& a) {
  constexpr int threads = 128, rows = 4 * Strips * 16, keys = attention_keys, tile_bytes = keys * TileOf<Width>::row_bytes;
  unsigned char* shared = dynamic_shared();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = a.heads / a.kv_heads, times = Paged ? group : 1;
  const FoundTile found = find_tile_or_one(a.starts, a.sequences, a.length, a.tiles - 1 - static_cast<int>(blockIdx.y), rows, times);
  const int head = static_cast<int>(blockIdx.x), kv_head = Paged ? head : head / group;
  if (found.length == 0) return;
  const int first = found.tile * rows, live = min(rows, found.length * times - first);  // rows of this tile
  const int held = Paged ? a.lengths[found.sequence] : found.length + a.past, past = held - found.length;
  const auto position = [&](int r) { return past + (first + r) / times; };
  const auto offset = [&](int r, std::int64_t stride) {
    const int row = first + r;
    return static_cast<std::int64_t>(found.begin + row / times) * stride + static_cast<std::int64_t>(Paged ? kv_head * group + row % times : head) * a.head_size;
  };
  const unsigned q_tile = shared_address(shared), k_tile = q_tile + rows * TileOf<Width>::row_bytes, v_tile = k_tile + 2 * tile_bytes;
  load_rows<rows, Width, threads>(q_tile, a.head_size, a.vector, [&](int r) -> const bf16* { return r < live ? a.q + offset(r, a.q_stride) : nullptr; });
  const int first_tile = a.window.first_tile(position(0), keys), key_tiles = position(live - 1) / keys + 1;
  const auto load_keys = [&](int t) {
    const int count = min(keys, held - t * keys);
    const unsigned stage = static_cast<unsigned>(t % 2 * tile_bytes);
    const bf16 *k, *v;
    std::int64_t k_stride = a.k_stride, v_stride = a.v_stride;
    if constexpr (Paged) {
      const std::int64_t page = a.blocks[found.sequence * a.blocks_stride + t * keys / a.page];
      const std::int64_t at = ((page * a.kv_heads + kv_head) * a.page + t * keys % a.page) * a.head_size;
      k = a.k + at, v = a.v + at, k_stride = v_stride = a.head_size;
    } else {
      k = a.k + static_cast<std::int64_t>(found.begin + t * keys) * k_stride + kv_head * a.head_size;
      v = a.v + static_cast<std::int64_t>(found.begin + t * keys) * v_stride + kv_head * a.head_size;
    }
    load_rows<keys, Width, threads>(k_tile + stage, a.head_size, a.vector, [&](int r) { return r < count ? k + r * k_stride : nullptr; });
    load_rows<keys, Width, threads>(v_tile + stage, a.head_size, a.vector, [&](int r) { return r < count ? v + r * v_stride : nullptr; });
    commit_copies();
  };
  load_keys(first_tile);

  float o[Strips][Width / 8][4] = {}, top[Strips][2], sum[Strips][2] = {};
#pragma unroll
  for (int s = 0; s < Strips; ++s) top[s][0] = top[s][1] = lowest<float>();
  const float scale2 = a.scale * 1.4426950408889634f;  // scores in units of ln 2
  const int strip_row = warp * Strips * 16;
  const LaneOffsets offsets(lane, TileOf<Width>::row_bytes);
  for (int t = first_tile; t < key_tiles; ++t) {
    wait_copies<0>();
    __syncthreads();
    if (t + 1 < key_tiles) load_keys(t + 1);
    const unsigned stage = static_cast<unsigned>(t % 2 * tile_bytes);
    float s[Strips][keys / 8][4] = {};
    product_rows<Width, Strips, keys / 8>(s, q_tile + static_cast<unsigned>(strip_row * TileOf<Width>::row_bytes), k_tile + stage, offsets);
    unsigned left[Strips][keys / 16][4];
    // Some key lies after this warp's first row, or outside the window of its last.
    const bool masked = (t + 1) * keys - 1 > position(strip_row) || a.window.cuts(position(strip_row + Strips * 16 - 1) - t * keys);
#pragma unroll
    for (int u = 0; u < Strips; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (masked) {
          const int last = position(strip_row + u * 16 + lane / 4 + half * 8) - t * keys;
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (a.window.hides(last - (n * 8 + lane % 4 * 2 + j))) s[u][n][half * 2 + j] = lowest<float>();
        }
        float m = top[u][half];
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) m = fmaxf(m, fmaxf(s[u][n][half * 2], s[u][n][half * 2 + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        // A row that has seen no key yet takes its exponentials from 0: they are 0.
        const float shift = m > lowest<float>() ? m * scale2 : 0.0f, shrink = exp2_fast(top[u][half] * scale2 - shift);
        top[u][half] = m;
        float total = 0;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float p = exp2_fast(fmaf(s[u][n][half * 2 + j], scale2, -shift));
            s[u][n][half * 2 + j] = p;
            total += p;
          }
        sum[u][half] = fmaf(sum[u][half], shrink, total);  // each lane's own keys; lanes join at the end
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) o[u][n][half * 2] *= shrink, o[u][n][half * 2 + 1] *= shrink;
      }
      pack_left<keys / 8>(left[u], s[u]);
    }
    product_columns<Width, Strips, keys / 16, Width / 8>(o, left, v_tile + stage, 0, offsets);
  }
#pragma unroll
  for (int u = 0; u < Strips; ++u) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[u][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      inverse[half] = 1.0f / total;
      const int r = strip_row + u * 16 + lane / 4 + half * 8;
      if (!Paged && a.lse != nullptr && lane % 4 == 0 && r < live)
        a.lse[static_cast<std::int64_t>(head) * a.rows + found.begin + first + r] = top[u][half] * a.scale + logf(total);
    }
    store_strip<Width, Width / 8>(o[u], inverse[0], inverse[1], shared, strip_row + u * 16, 0, a.head_size, a.vector, lane,
                                  [&](int r) -> bf16* { return strip_row + u * 16 + r < live ? a.out + offset(strip_row + u * 16 + r, a.out_stride) : nullptr; });
  }
}

template <int Width, int Strips, bool Paged>
__global__ void __launch_bounds__(128, 2) attention_forward_kernel(const __grid_constant__ ForwardArguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  // Here two strips of 128 columns do not fit into the registers: the plan never asks for them.
  if constexpr (Width == 128 && Strips == 2) __trap();
  else attention_forward_tile<Width, Strips, Paged>(a);
#else
  attention_forward_tile<Width, Strips, Paged>(a);
#endif
}

template <bool Paged>
void run(Context& ctx, const ForwardArguments& arguments, unsigned heads) {
  const AttentionPlan plan = plan_attention_forward(arguments.head_size, Paged, ctx.capability());
  const Launch l{heads, static_cast<unsigned>(arguments.tiles), 1, 128, static_cast<unsigned>(plan.shared_bytes)};
  const char* name = Paged ? "attention_paged" : "attention";
  constexpr int strips = Paged ? 1 : 2;
  switch (plan.width) {
    case 32: launch(ctx, l, name, attention_forward_kernel<32, strips, Paged>, arguments); break;
    case 64: launch(ctx, l, name, attention_forward_kernel<64, strips, Paged>, arguments); break;
    case 96: launch(ctx, l, name, attention_forward_kernel<96, 1, Paged>, arguments); break;
    case 128:
      if (plan.strips == 1) launch(ctx, l, name, attention_forward_kernel<128, 1, Paged>, arguments);
      else launch(ctx, l, name, attention_forward_kernel<128, strips, Paged>, arguments);
      break;
    case 192: launch(ctx, l, name, attention_forward_kernel<192, 1, Paged>, arguments); break;
    default: launch(ctx, l, name, attention_forward_kernel<256, 1, Paged>, arguments); break;
  }
}

}  // namespace

void attention_forward_tensor(Context& ctx, const Attention& a) {
  ForwardArguments f{};
  f.q = static_cast<const bf16*>(a.q), f.k = static_cast<const bf16*>(a.k), f.v = static_cast<const bf16*>(a.v), f.out = static_cast<bf16*>(a.out);
  f.q_stride = a.q_stride, f.k_stride = a.k_stride, f.v_stride = a.v_stride, f.out_stride = a.out_stride, f.rows = a.rows;
  f.heads = static_cast<int>(a.heads), f.kv_heads = static_cast<int>(a.kv_heads), f.head_size = static_cast<int>(a.head_size);
  f.sequences = static_cast<int>(a.sequences), f.scale = static_cast<float>(a.scale), f.window = window_of(a.window), f.starts = a.starts, f.lse = static_cast<float*>(a.lse);
  f.length = rows_of_one(a), f.past = keys_ahead_of_one(a);
  f.tiles = static_cast<int>(attention_tiles(a.host_starts, a.sequences, a.rows, plan_attention_forward(a.head_size, false, ctx.capability()).rows));
  f.vector = a.head_size % 8 == 0 && (a.q_stride | a.k_stride | a.v_stride | a.out_stride) % 8 == 0 && all_on_16(a.q, a.k, a.v, a.out);
  run<false>(ctx, f, static_cast<unsigned>(a.heads));
}

void attention_paged_tensor(Context& ctx, const PagedAttention& a) {
  ForwardArguments f{};
  f.q = static_cast<const bf16*>(a.q), f.k = static_cast<const bf16*>(a.k_pages), f.v = static_cast<const bf16*>(a.v_pages), f.out = static_cast<bf16*>(a.out);
  f.q_stride = a.q_stride, f.out_stride = a.out_stride, f.rows = a.rows;
  f.heads = static_cast<int>(a.heads), f.kv_heads = static_cast<int>(a.kv_heads), f.head_size = static_cast<int>(a.head_size);
  f.sequences = static_cast<int>(a.sequences), f.scale = static_cast<float>(a.scale), f.window = window_of(a.window), f.starts = a.starts;
  f.blocks = a.blocks, f.lengths = a.lengths, f.blocks_stride = a.blocks_stride, f.page = static_cast<int>(a.page);
  f.tiles = static_cast<int>(attention_tiles(a.host_starts, a.sequences, a.rows, plan_attention_forward(a.head_size, true, ctx.capability()).rows, a.heads / a.kv_heads));
  f.vector = a.head_size % 8 == 0 && (a.q_stride | a.out_stride) % 8 == 0 && all_on_16(a.q, a.k_pages, a.v_pages, a.out);
  run<true>(ctx, f, static_cast<unsigned>(a.kv_heads));
}

}  // namespace capstan::kernels::cuda
