// defines: what the row and attention kernels share: 16-byte packs, conversions, reductions in a fixed order.
#pragma once
#include <kernels/cuda/context.h>
#include <kernels/cuda/rows_plan.h>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace capstan::kernels::cuda {

/// N elements that are loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack { T v[N]; };

template <class T>
__device__ __forceinline__ Compute<T> widen(T x) {
  if constexpr (std::is_same_v<T, bf16>) return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
  else return x;
}

template <class T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat16 h = __float2bfloat16_rn(x);
    bf16 r;
    r.bits = __bfloat16_as_ushort(h);
    return r;
  } else {
    return x;
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 u = *reinterpret_cast<const uint4*>(from);
    return *reinterpret_cast<const Pack<T, N>*>(&u);
  } else {
    return *reinterpret_cast<const Pack<T, N>*>(from);
  }
}

/// For data that is not read again soon.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack_once(const T* from) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 u = __ldcs(reinterpret_cast<const uint4*>(from));
    return *reinterpret_cast<const Pack<T, N>*>(&u);
  } else {
    return *reinterpret_cast<const Pack<T, N>*>(from);
  }
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Compute<T> (&x)[N]) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    Pack<__nv_bfloat162, N / 2> p;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p.v[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    if constexpr (N == 8) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&p);
    else *reinterpret_cast<Pack<__nv_bfloat162, N / 2>*>(to) = p;
  } else {
    Pack<T, N> p;
#pragma unroll
    for (int i = 0; i < N; ++i) p.v[i] = narrow<T>(x[i]);
    if constexpr (sizeof(p) == 16) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&p);
    else *reinterpret_cast<Pack<T, N>*>(to) = p;
  }
}

/// N elements at `from` in the compute type, in loads of at most 16 bytes.
template <class T, int N>
__device__ __forceinline__ void load_wide(const T* from, Compute<T> (&to)[N]) {
  constexpr int most = 16 / static_cast<int>(sizeof(T)), step = N < most ? N : most;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    const Pack<T, step> p = load_pack<T, step>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) to[i + j] = widen(p.v[j]);
  }
}

struct Sum {
  template <class A> __device__ __forceinline__ A operator()(A a, A b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

template <class A, class Op>
__device__ __forceinline__ A warp_reduce(A x, Op op) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// Over the threads of one row: blockDim.x of them, blockDim.y rows at once. `room` holds one number a warp. Every
/// thread of the block must come here; all threads of a row get the same bits.
template <class A, class Op>
__device__ __forceinline__ A row_reduce(A x, Op op, A* room) {
  x = warp_reduce(x, op);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return x;
  A* mine = room + threadIdx.y * warps;
  __syncthreads();  // the room may still be read for the reduction before
  if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = x;
  __syncthreads();
  x = mine[0];
#pragma unroll 1
  for (int w = 1; w < warps; ++w) x = op(x, mine[w]);
  return x;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// e^x; f32 within 2 units in the last place plus the rounding of x / ln 2.
__device__ __forceinline__ float exp_of(float x) { return exp2_fast(x * 1.4426950408889634f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

template <class A> __device__ __forceinline__ A lowest();
template <> __device__ __forceinline__ float lowest<float>() { return __int_as_float(0xff800000); }
template <> __device__ __forceinline__ double lowest<double>() { return __longlong_as_double(0xfff0000000000000ll); }

inline bool on_16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
template <class... P> bool all_on_16(P... p) { return (on_16(p) && ...); }

}  // namespace capstan::kernels::cuda
