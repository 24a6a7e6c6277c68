// Quantizers to fp8: the largest magnitude of a matrix, then the matrix and its transpose in one pass. Magnitudes are
// compared as integers, whose maximum is the same in any order: atomics cannot change a bit. Scales stay on the device.
#include <kernels/cuda/fp8.h>
#include <kernels/cuda/quantize_plan.h>
#include <kernels/cuda/lane.cuh>

#include <kernels/shared/fp8.h>

namespace capstan::kernels::cuda {

namespace {

using Tile = QuantizeTile;

__device__ std::uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }
__device__ std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

template <class T, int Width>
__global__ void __launch_bounds__(amax_threads)
    amax_kernel(std::int64_t packs, std::int64_t per_row, std::int64_t stride, const T* x, std::uint32_t* amax) {
  __shared__ std::uint32_t warps[amax_threads / 32];
  std::uint32_t most = 0;
  const std::int64_t step_packs = static_cast<std::int64_t>(gridDim.x) * amax_threads;
  const bool one_row = packs == per_row;
#pragma unroll 4
  for (std::int64_t p = static_cast<std::int64_t>(blockIdx.x) * amax_threads + threadIdx.x; p < packs; p += step_packs) {
    const std::int64_t r = one_row ? 0 : p / per_row;
    const Pack<T, Width> pack = *reinterpret_cast<const Pack<T, Width>*>(x + r * stride + (p - r * per_row) * Width);
#pragma unroll
    for (int k = 0; k < Width; ++k) most = larger(most, magnitude(static_cast<float>(pack.v[k])));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < amax_threads / 32; ++w) most = larger(most, warps[w]);
  atomicMax(amax, most);
}

/// Two numbers as fp8, the first in the low byte. GPUs have an instruction that does what to_fp8() says (NVIDIA's own host
/// code, which the tests hold to_fp8() against, is its specification).
template <class F>
__device__ std::uint32_t two_fp8(float low, float high) {
#if defined(__CUDA_ARCH__)
  unsigned short two;
  if constexpr (std::is_same_v<F, E4M3>)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  return two;
#else
  return to_fp8<F>(low) | static_cast<std::uint32_t>(to_fp8<F>(high)) << 8;
#endif
}

/// Sixteen numbers as fp8, stored at once.
template <class F>
__device__ void store_run(const float* v, float inverse, std::uint8_t* to) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float* x = v + 4 * w;
    words[w] = two_fp8<F>(x[0] * inverse, x[1] * inverse) | two_fp8<F>(x[2] * inverse, x[3] * inverse) << 16;
  }
  *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}

/// The scale of a run: the whole matrix's, or that of the 32 numbers which it and its neighbour lane hold.
template <class F, bool Blocks>
__device__ std::uint32_t code_of(const float* v, std::uint32_t whole) {
  if constexpr (!Blocks) return whole;
  std::uint32_t most = 0;
#pragma unroll
  for (int k = 0; k < Tile::run; ++k) most = larger(most, magnitude(v[k]));
  return scale_code<F>(larger(most, __shfl_xor_sync(0xffffffffu, most, 1)));
}

/// One tile a block. Threads 4 i to 4 i + 3 take row i, and after the tile is turned over in shared memory, column i.
template <class T, class F, bool Blocks, bool Vector>
__global__ void __launch_bounds__(Tile::threads)
    quantize_kernel(std::int64_t rows, std::int64_t cols, std::int64_t stride, std::int64_t tile_cols, const T* x,
                    std::uint8_t* data, void* scale, std::uint8_t* turned, std::uint8_t* turned_scale) {
  __shared__ float tile[Tile::rows][Tile::cols + 1];
  const std::int64_t r0 = blockIdx.x / tile_cols * Tile::rows, c0 = blockIdx.x % tile_cols * Tile::cols;
  const int line = static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4 * Tile::run;
  const std::int64_t r = r0 + line, c = c0 + part;
  std::uint32_t whole = 0;
  if constexpr (!Blocks) {
    whole = scale_code<F>(bits_of(static_cast<const float*>(scale)[1]));
    if (blockIdx.x == 0 && threadIdx.x == 0) static_cast<float*>(scale)[0] = e8m0_value(whole);
  }
  float v[Tile::run];
  const bool inside = r < rows && c < cols;
  if (inside) {
    const T* from = x + r * stride + c;
    constexpr int width = Vector ? 16 / static_cast<int>(sizeof(T)) : 1;
#pragma unroll
    for (int k = 0; k < Tile::run; k += width) {
      const Pack<T, width> pack = *reinterpret_cast<const Pack<T, width>*>(from + k);
#pragma unroll
      for (int j = 0; j < width; ++j) v[k + j] = static_cast<float>(pack.v[j]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < Tile::run; ++k) v[k] = 0;
  }
  if (data != nullptr) {
    const std::uint32_t code = code_of<F, Blocks>(v, whole);
    if (inside) {
      store_run<F>(v, e8m0_inverse(code), data + r * cols + c);
      if (Blocks && part % fp8_block == 0)
        static_cast<std::uint8_t*>(scale)[block_scale_at(r, c / fp8_block, cols / fp8_block)] =
            static_cast<std::uint8_t>(code);
    }
  }
  if (turned == nullptr) return;
#pragma unroll
  for (int k = 0; k < Tile::run; ++k) tile[line][part + k] = v[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Tile::run; ++k) v[k] = tile[part + k][line];
  const std::int64_t padded = fp8_padded(Blocks ? Scaling::block : Scaling::tensor, rows), row = c0 + line, at = r0 + part;
  const std::uint32_t code = code_of<F, Blocks>(v, whole);
  if (row >= cols || at >= padded) return;
  store_run<F>(v, e8m0_inverse(code), turned + row * padded + at);
  if (Blocks && part % fp8_block == 0)
    turned_scale[block_scale_at(row, at / fp8_block, padded / fp8_block)] = static_cast<std::uint8_t>(code);
}

template <class T, class F, bool Blocks>
void quantize_as(Context& ctx, const Quantize& q) {
  const T* x = static_cast<const T*>(q.x);
  auto* scale = static_cast<std::uint8_t*>(q.scale);
  if constexpr (Blocks) {
    const auto clear = [&](void* to, std::int64_t rows, std::int64_t k) {
      ctx.clear(to, scale_bytes(Scaling::block, rows, k), "clearing scales");
    };
    if (q.data != nullptr) clear(q.scale, q.rows, q.cols);
    if (q.turned != nullptr) clear(q.turned_scale, q.cols, fp8_padded(q.scaling, q.rows));
  } else {
    ctx.clear(scale, 8, "clearing a scale");
    const AmaxPlan p = amax_plan(q.rows, q.cols, q.stride, sizeof(T), x);
    Launch l;
    l.grid_x = static_cast<unsigned>(p.blocks), l.block = amax_threads;
    auto* amax = reinterpret_cast<std::uint32_t*>(scale) + 1;
    if (p.width > 1)
      launch(ctx, l, "largest magnitude", amax_kernel<T, 16 / static_cast<int>(sizeof(T))>, p.packs, p.per_row, q.stride, x,
             amax);
    else
      launch(ctx, l, "largest magnitude", amax_kernel<T, 1>, p.packs, p.per_row, q.stride, x, amax);
  }
  const QuantizePlan p = quantize_plan(q.rows, q.cols, q.stride, sizeof(T), x);
  Launch l;
  l.grid_x = static_cast<unsigned>(p.tiles), l.block = Tile::threads;
  const auto kernel = p.vector ? quantize_kernel<T, F, Blocks, true> : quantize_kernel<T, F, Blocks, false>;
  launch(ctx, l, "quantizing", kernel, q.rows, q.cols, q.stride, p.tile_cols, x, static_cast<std::uint8_t*>(q.data), q.scale,
         static_cast<std::uint8_t*>(q.turned), static_cast<std::uint8_t*>(q.turned_scale));
}

}  // namespace

void quantize(Context& ctx, const Quantize& q) {
  const auto with = [&]<class T, class F>() {
    if (q.scaling == Scaling::block)
      quantize_as<T, F, true>(ctx, q);
    else
      quantize_as<T, F, false>(ctx, q);
  };
  const auto as = [&]<class F>() {
    if (q.from == Num::f32)
      with.template operator()<float, F>();
    else if (q.from == Num::bf16)
      with.template operator()<bf16, F>();
    else
      throw std::invalid_argument("[quantize] from: expected f32 or bf16, got element type number " +
                                  std::to_string(static_cast<int>(q.from)));
  };
  if (q.to == Num::f8e4m3)
    as.template operator()<E4M3>();
  else if (q.to == Num::f8e5m2)
    as.template operator()<E5M2>();
  else
    throw std::invalid_argument("[quantize] to: expected e4m3 or e5m2, got element type number " +
                                std::to_string(static_cast<int>(q.to)));
}

}  // namespace capstan::kernels::cuda
