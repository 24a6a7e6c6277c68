// defines: what the tensor-core attention kernels share: swizzled tiles in shared memory, asynchronous copies, 16x8x16
// products, and the search for a block's tile among ragged sequences.
#pragma once
#include <kernels/cuda/attention_plan.h>
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/tensor_core.cuh>

namespace capstan::kernels::cuda {

/// A tile of bf16 rows in shared memory. Chunks of 16 bytes are permuted within each 128 so that the eight rows that
/// one matrix load reads lie on different banks.
template <int Width>
struct TileOf {
  static constexpr int chunks = (Width + 63) / 64 * 8;  ///< of a row as stored
  static constexpr int row_bytes = chunks * 16;
  static __device__ __forceinline__ unsigned at(int row, int chunk) {
    return static_cast<unsigned>(row * row_bytes + ((chunk ^ (row & 7)) << 4));
  }
};

/// Which keys a row sees: those at a distance (row's position less key's) of 0 to `reach` - 1. As unsigned numbers later
/// keys, too, are too far.
struct Window {
  int keys;        ///< 0: no window
  unsigned reach;
  __device__ __forceinline__ bool hides(int distance) const { return static_cast<unsigned>(distance) >= reach; }
  /// The first tile of `size` keys that the row at `position` sees.
  __device__ __forceinline__ int first_tile(int position, int size) const { return keys > 0 ? max(0, position - keys + 1) / size : 0; }
  /// Rows from `key` on that see it, in a sequence of `length`, end here.
  __device__ __forceinline__ int end(int key, int length) const { return keys > 0 ? min(length, key + keys) : length; }
  /// Whether some pair at this distance or nearer is hidden by the window.
  __device__ __forceinline__ bool cuts(int distance) const { return keys > 0 && distance >= keys; }
};
inline Window window_of(std::int64_t window) {
  constexpr std::int64_t most = 1 << 30;  // positions plus this are still ints
  const int keys = static_cast<int>(window < most ? window : most);
  return {keys, keys > 0 ? static_cast<unsigned>(keys) : 0x80000000u};
}

__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&p);
}

/// Rows [0, Rows) of a tile from row(r), a pointer to `size` elements or null (zeros). `vector`: 16-byte rows and sizes.
template <int Rows, int Width, int Threads, class RowPointer>
__device__ __forceinline__ void load_rows(unsigned to, int size, bool vector, RowPointer&& row) {
  constexpr int chunks = Width / 8;
  if (vector) {
#pragma unroll 1
    for (int i0 = 0; i0 < Rows * chunks; i0 += Threads) {
      const int i = i0 + static_cast<int>(threadIdx.x);
      if (Rows * chunks % Threads != 0 && i >= Rows * chunks) break;
      const int r = i / chunks, c = i % chunks;
      const bf16* from = row(r);
      const bool valid = from != nullptr && c * 8 < size;
      copy_async(to + TileOf<Width>::at(r, c), valid ? static_cast<const void*>(from + c * 8) : static_cast<const void*>(row(0)), valid);
    }
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Rows * chunks * 4; i += Threads) {
      const int r = i / (chunks * 4), c = i % (chunks * 4) * 2;
      const bf16* from = row(r);
      unsigned word = 0;
      if (from != nullptr && c < size) word = from[c].bits;
      if (from != nullptr && c + 1 < size) word |= static_cast<unsigned>(from[c + 1].bits) << 16;
      store_word(to + TileOf<Width>::at(r, c / 8) + static_cast<unsigned>(c % 8 * 2), word);
    }
  }
}

/// Where a lane's row of a matrix load lies: row offset and swizzle, found once; the loads then take one exclusive or.
struct LaneOffsets {
  unsigned rows, rows_swizzle;  ///< rows lane % 16, chunk lane / 16: rows of a, and transposed loads of b
  unsigned cols, cols_swizzle;  ///< rows lane % 8 + 8 (lane / 16), chunk lane / 8 % 2: rows of b
  __device__ __forceinline__ LaneOffsets(int lane, int row_bytes)
      : rows(static_cast<unsigned>(lane % 16 * row_bytes)), rows_swizzle(static_cast<unsigned>(((lane / 16) ^ (lane & 7)) << 4)),
        cols(static_cast<unsigned>((lane / 16 * 8 + lane % 8) * row_bytes)), cols_swizzle(static_cast<unsigned>(((lane / 8 % 2) ^ (lane & 7)) << 4)) {}
};
/// Byte offset in a row of an even chunk, before the lane's own part.
__device__ __forceinline__ unsigned chunk_offset(int chunk, unsigned swizzle) {
  return (static_cast<unsigned>(chunk & 6) << 4 ^ swizzle) + static_cast<unsigned>((chunk & ~7) << 4);
}

/// c[16, 8 N] += a[16, Width] b[8 N, Width]^T; a and b are addresses of first rows (multiples of 8).
template <int Width, int Strips, int N>
__device__ __forceinline__ void product_rows(float (&c)[Strips][N][4], unsigned a, unsigned b, const LaneOffsets& lane) {
#pragma unroll 2  // further, addresses would take the registers that accumulators need
  for (int k = 0; k < Width / 16; ++k) {
    unsigned fa[Strips][4];
#pragma unroll
    for (int s = 0; s < Strips; ++s) load_matrices(fa[s], a + static_cast<unsigned>(s * 16 * TileOf<Width>::row_bytes) + lane.rows + chunk_offset(k * 2, lane.rows_swizzle));
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      unsigned fb[4];
      load_matrices(fb, b + static_cast<unsigned>(n * 16 * TileOf<Width>::row_bytes) + lane.cols + chunk_offset(k * 2, lane.cols_swizzle));
#pragma unroll
      for (int s = 0; s < Strips; ++s) {
        multiply(c[s][2 * n], fa[s], fb[0], fb[1]);
        multiply(c[s][2 * n + 1], fa[s], fb[2], fb[3]);
      }
    }
  }
}

/// An accumulator [16, 8 N], rounded to bf16, as the left side of the next product.
template <int N>
__device__ __forceinline__ void pack_left(unsigned (&a)[N / 2][4], const float (&p)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    a[k][0] = pack_pair(p[2 * k][0], p[2 * k][1]);
    a[k][1] = pack_pair(p[2 * k][2], p[2 * k][3]);
    a[k][2] = pack_pair(p[2 * k + 1][0], p[2 * k + 1][1]);
    a[k][3] = pack_pair(p[2 * k + 1][2], p[2 * k + 1][3]);
  }
}

/// c[16, 8 Columns] += a[16, 16 K] b[16 K, columns]; b's columns from chunk `first` (even).
template <int Width, int Strips, int K, int Columns>
__device__ __forceinline__ void product_columns(float (&c)[Strips][Columns][4], const unsigned (&a)[Strips][K][4], unsigned b, int first, const LaneOffsets& lane) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int n = 0; n < Columns / 2; ++n) {
      unsigned fb[4];
      load_matrices_transposed(fb, b + static_cast<unsigned>(k * 16 * TileOf<Width>::row_bytes) + lane.rows + chunk_offset(first + n * 2, lane.rows_swizzle));
#pragma unroll
      for (int s = 0; s < Strips; ++s) {
        multiply(c[s][2 * n], a[s][k], fb[0], fb[1]);
        multiply(c[s][2 * n + 1], a[s][k], fb[2], fb[3]);
      }
    }
}

/// Both as eight numbers; sums in f32.
__device__ __forceinline__ unsigned add_pairs(unsigned a, unsigned b) {
  const auto number = [](unsigned bits) { return __int_as_float(static_cast<int>(bits)); };
  return pack_pair(number(a << 16) + number(b << 16), number(a & 0xffff0000u) + number(b & 0xffff0000u));
}

/// A warp's strip of 16 rows leaves through shared memory (rows `row` .. of tile `stage`, which the warp owns), so that
/// stores are of 16 bytes. target(r): where row r of the strip begins, or null. `add`: to what is there.
template <int Width, int Columns, class RowPointer>
__device__ __forceinline__ void store_strip(const float (&c)[Columns][4], float upper, float lower, unsigned char* stage, int row, int first, int size,
                                            bool vector, int lane, RowPointer&& target, bool add = false) {
#pragma unroll
  for (int n = 0; n < Columns; ++n) {
    const int chunk = first + n, at = lane % 4 * 4;
    *reinterpret_cast<unsigned*>(stage + TileOf<Width>::at(row + lane / 4, chunk) + at) = pack_pair(c[n][0] * upper, c[n][1] * upper);
    *reinterpret_cast<unsigned*>(stage + TileOf<Width>::at(row + lane / 4 + 8, chunk) + at) = pack_pair(c[n][2] * lower, c[n][3] * lower);
  }
  __syncwarp();
#pragma unroll
  for (int i0 = 0; i0 < 16 * Columns; i0 += 32) {
    const int i = i0 + lane;
    if (16 * Columns % 32 != 0 && i >= 16 * Columns) break;
    const int r = i / Columns, chunk = first + i % Columns;
    bf16* to = target(r);
    if (to == nullptr || chunk * 8 >= size) continue;
    uint4 v = *reinterpret_cast<const uint4*>(stage + TileOf<Width>::at(row + r, chunk));
    if (vector) {
      if (add) {
        const uint4 old = *reinterpret_cast<const uint4*>(to + chunk * 8);
        v.x = add_pairs(v.x, old.x), v.y = add_pairs(v.y, old.y), v.z = add_pairs(v.z, old.z), v.w = add_pairs(v.w, old.w);
      }
      *reinterpret_cast<uint4*>(to + chunk * 8) = v;
    } else {
      const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (chunk * 8 + j < size) {
          unsigned bits = words[j / 2] >> (j % 2 * 16) & 0xffffu;
          if (add) bits = add_pairs(bits, to[chunk * 8 + j].bits);
          to[chunk * 8 + j].bits = static_cast<std::uint16_t>(bits);
        }
    }
  }
  __syncwarp();
}

/// One block's tile: `index` counts tiles of `rows` rows over all sequences.
struct FoundTile {
  int begin = 0, length = 0;  ///< of the sequence, in rows of the space
  int sequence = 0, tile = 0;
};

/// Called by whole warps; every warp finds the same.
__device__ __forceinline__ FoundTile find_tile(const std::int32_t* starts, int sequences, int index, int rows, int times = 1) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  FoundTile f;
  for (int base = 0; base < sequences; base += 32) {
    const int s = base + lane;
    const int begin = s < sequences ? starts[s] : 0, length = s < sequences ? starts[s + 1] - begin : 0;
    const int tiles = (length * times + rows - 1) / rows;
    int before = tiles;  // inclusive sum over lanes
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    const unsigned reached = __ballot_sync(0xffffffffu, index < before);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      f.begin = __shfl_sync(0xffffffffu, begin, owner);
      f.length = __shfl_sync(0xffffffffu, length, owner);
      f.tile = index - __shfl_sync(0xffffffffu, before - tiles, owner);
      f.sequence = base + owner;
      return f;
    }
    index -= __shfl_sync(0xffffffffu, before, 31);
  }
  return f;  // length 0: no such tile
}

/// Among `sequences`, or, where `starts` is null, of the one sequence of `length` rows at the pointers themselves.
__device__ __forceinline__ FoundTile find_tile_or_one(const std::int32_t* starts, int sequences, int length, int index, int rows, int times = 1) {
  if (starts != nullptr) return find_tile(starts, sequences, index, rows, times);
  FoundTile f;
  f.length = length, f.tile = index;
  return f;
}

}  // namespace capstan::kernels::cuda
