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

/// In stores of at most 16 bytes: more than that is not promised to be aligned.
template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Compute<T> (&x)[N]) {
  if constexpr (sizeof(T) * N > 16) {
    constexpr int step = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < N; i += step) {
      Compute<T> part[step];
#pragma unroll
      for (int j = 0; j < step; ++j) part[j] = x[i + j];
      store_pack<T, step>(to + i, part);
    }
  } else if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
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

/// Over the threads of one row: blockDim.x of them (8, 16 or a multiple of 32), blockDim.y rows at once. Every thread of
/// the block must come here; all threads of a row get the same bits. V has join(other): what the lower threads hold
/// comes first.
template <class V>
struct RowReducer {
  V* room;  ///< shared, [2][32]: two, so that one barrier a reduction is enough
  int turn = 0;

  __device__ __forceinline__ V operator()(V x) {
    const int width = static_cast<int>(blockDim.x);
    for (int step = 1; step < 32 && step < width; step <<= 1) {
      const V other = x.from_lane(static_cast<int>(threadIdx.x % 32u) ^ step, step);
      if ((threadIdx.x & static_cast<unsigned>(step)) == 0) {
        x.join(other);
      } else {
        V first = other;
        first.join(x);
        x = first;
      }
    }
    if (width <= 32) return x;
    const int warps = width / 32;
    V* mine = room + turn * 32 + threadIdx.y * static_cast<unsigned>(warps);
    turn ^= 1;
    if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = x;
    __syncthreads();
    x = mine[0];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) x.join(mine[w]);
    return x;
  }
};

/// N sums.
template <class A, int N>
struct Sums {
  A v[N];
  __device__ __forceinline__ void join(const Sums& o) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += o.v[i];
  }
  __device__ __forceinline__ Sums from_lane(int, int step) const {
    Sums o;
#pragma unroll
    for (int i = 0; i < N; ++i) o.v[i] = __shfl_xor_sync(0xffffffffu, v[i], step);
    return o;
  }
};
template <class A>
struct Highest {
  A v;
  __device__ __forceinline__ void join(const Highest& o) { v = Max{}(v, o.v); }
  __device__ __forceinline__ Highest from_lane(int, int step) const { return {__shfl_xor_sync(0xffffffffu, v, step)}; }
};
/// Count, mean and sum of squared distances from it (Chan, Golub & LeVeque 1979).
template <class A>
struct Moments {
  A count, mean, squares;
  __device__ __forceinline__ void join(const Moments& o) {
    const A n = count + o.count, part = n > A(0) ? divide(o.count, n) : A(0), d = o.mean - mean;
    squares += o.squares + d * d * count * part;
    mean += d * part;
    count = n;
  }
  __device__ __forceinline__ Moments from_lane(int, int step) const {
    return {__shfl_xor_sync(0xffffffffu, count, step), __shfl_xor_sync(0xffffffffu, mean, step), __shfl_xor_sync(0xffffffffu, squares, step)};
  }
  static __device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
  static __device__ __forceinline__ double divide(double a, double b) { return a / b; }
};

/// Over all threads of a block of one dimension, for kernels of few blocks. `room` holds 32 numbers.
template <class A, class Op>
__device__ __forceinline__ A block_reduce(A x, Op op, A* room) {
  x = warp_reduce(x, op);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = room[0];
#pragma unroll 1
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) x = op(x, room[w]);
  return x;
}

/// A row's packs: held in registers, or read again for each sweep when Packs is 0.
template <class T, int Width, int Packs>
struct Row {
  static constexpr int held = Packs > 0 ? Packs : 1;
  const T* from = nullptr;
  bool live = false;
  Pack<T, Width> raw[held];

  __device__ __forceinline__ void load(const T* row, bool is_live, int cols) {
    from = row, live = is_live;
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p) {
        const int c = static_cast<int>(threadIdx.x + p * blockDim.x) * Width;
        if (live && c < cols) raw[p] = load_pack<T, Width>(from + c);
      }
    }
  }
  /// Becomes the row plus `other`, rounded, which is left at `to`.
  __device__ __forceinline__ void add(const Row& other, T* to, int cols) {
    other.sweep(cols, [&](int p, int c, const Pack<T, Width>& o) {
      const Pack<T, Width> mine = Packs > 0 ? raw[p] : load_pack<T, Width>(from + c);
      Compute<T> sum[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) sum[i] = widen(mine.v[i]) + widen(o.v[i]);
      store_pack<T, Width>(to + c, sum);
      if constexpr (Packs > 0)
#pragma unroll
        for (int i = 0; i < Width; ++i) raw[p].v[i] = narrow<T>(sum[i]);
    });
    from = to;
  }
  /// f(p, column, pack).
  template <class F>
  __device__ __forceinline__ void sweep(int cols, F&& f) const {
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p) {
        const int c = static_cast<int>(threadIdx.x + p * blockDim.x) * Width;
        if (live && c < cols) f(p, c, raw[p]);
      }
    } else if (live) {
      for (int c = static_cast<int>(threadIdx.x) * Width; c < cols; c += static_cast<int>(blockDim.x) * Width) f(0, c, load_pack<T, Width>(from + c));
    }
  }
};

/// f(width, packs) with integral constants of `plan`: rows in registers, or one element at a time.
template <class T, class F>
void by_plan(const RowPlan& plan, F&& f) {
  constexpr std::integral_constant<int, 16 / static_cast<int>(sizeof(T))> wide{};
  constexpr std::integral_constant<int, 1> one{};
  if constexpr (sizeof(T) < 8) {
    if (plan.width > 1) {
      if (plan.packs == 1) return f(wide, std::integral_constant<int, 1>{});
      if (plan.packs == 2) return f(wide, std::integral_constant<int, 2>{});
      if (plan.packs == 3) return f(wide, std::integral_constant<int, 3>{});
      if (plan.packs == 4) return f(wide, std::integral_constant<int, 4>{});
      return f(wide, std::integral_constant<int, 0>{});
    }
  }
  f(one, std::integral_constant<int, 0>{});
}
/// f64 has no kernels with rows in registers: it is the reference, not what trains.
template <class T>
RowPlan rows_for(std::int64_t cols, bool vector, int most_packs = 4) {
  return plan_rows(cols, sizeof(T), vector && sizeof(T) < 8 && cols % (16 / static_cast<int>(sizeof(T))) == 0, most_packs);
}
#if defined(__CUDACC__)
/// Starts `kernel` in the context's stream.
template <class... Parameters, class... Arguments>
void launch_block(Context& ctx, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::int64_t shared, Arguments... arguments) {
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  kernel<<<grid, block, static_cast<unsigned>(shared), ctx.stream()>>>(arguments...);
  check(cudaGetLastError(), name);
}
/// The same with clusters of `cluster` blocks.
template <class... Parameters, class... Arguments>
void launch_clusters(Context& ctx, const char* name, void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, std::int64_t shared, Arguments... arguments) {
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster), attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = static_cast<std::size_t>(shared), config.stream = ctx.stream();
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}
/// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}
#endif

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
#if defined(__CUDACC__)
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  y = exp2f(x);
#endif
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
