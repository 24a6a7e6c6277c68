// RMSNorm and LayerNorm: a row is read once and stays in registers. The backwards' blocks each take every n-th group of
// rows and keep their sums for the weights in registers: no atomics, one order for a shape.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/rows.h>

#include <algorithm>

namespace capstan::kernels::cuda {

namespace {

/// Calls f with integral constants for the pack width and count of `plan`.
template <class T, int... Counts, class F>
void by_plan(const RowPlan& plan, std::integer_sequence<int, Counts...>, F&& f) {
  const auto counts = [&]<int Width>(std::integral_constant<int, Width> width) {
    (void)((plan.packs == Counts && (f(width, std::integral_constant<int, Counts>{}), true)) || ...);
  };
  if (plan.width == 1) counts(std::integral_constant<int, 1>{});
  else counts(std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{});
}

template <class T, bool Centre, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 2) norm_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x, const Compute<T>* __restrict__ w,
                                                    const Compute<T>* __restrict__ b, Compute<T> epsilon, T* __restrict__ y,
                                                    Compute<T>* __restrict__ mean_out, Compute<T>* __restrict__ inverse_out) {
  using C = Compute<T>;
  __shared__ C room[32];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < rows;
  const T* from = x + row * cols;
  const int step = static_cast<int>(blockDim.x) * Width, first = static_cast<int>(threadIdx.x) * Width;
  C mean = 0;
  constexpr int held = Packs > 0 ? Packs : 1;
  Pack<T, Width> raw[held];
  // Long rows are read again for each sweep (from the cache); the others are read here.
  if constexpr (Packs > 0) {
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (live && first + p * step < cols) raw[p] = load_pack<T, Width>(from + first + p * step);
  }
  const auto sweep = [&](auto&& f) {  // f(column, pack)
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (live && first + p * step < cols) f(first + p * step, raw[p]);
    } else {
      if (live)
        for (int c = first; c < cols; c += step) f(c, load_pack<T, Width>(from + c));
    }
  };
  if constexpr (Centre) {
    C sum = 0;
    sweep([&](int, const Pack<T, Width>& v) {
#pragma unroll
      for (int i = 0; i < Width; ++i) sum += widen(v.v[i]);
    });
    mean = row_reduce(sum, Sum{}, room) * per;
  }
  C squares = 0;
  sweep([&](int, const Pack<T, Width>& v) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const C d = widen(v.v[i]) - mean;
      squares += d * d;
    }
  });
  const C inverse = inverse_root(row_reduce(squares, Sum{}, room) * per + epsilon);
  if (live && threadIdx.x == 0) {
    inverse_out[row] = inverse;
    if constexpr (Centre) mean_out[row] = mean;
  }
  sweep([&](int c, const Pack<T, Width>& v) {
    C scale[Width], out[Width];
    load_wide<C, Width>(w + c, scale);
#pragma unroll
    for (int i = 0; i < Width; ++i) out[i] = (widen(v.v[i]) - mean) * inverse * scale[i];
    if constexpr (Centre) {
      if (b != nullptr) {
        load_wide<C, Width>(b + c, scale);
#pragma unroll
        for (int i = 0; i < Width; ++i) out[i] += scale[i];
      }
    }
    store_pack<T, Width>(y + row * cols + c, out);
  });
}

/// Rows are taken by group: blockDim.y rows at once, group after group gridDim.x apart.
template <class T, bool Centre, int Width, int Packs>
__global__ void __launch_bounds__(row_threads) norm_backward_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x,
                                                             const Compute<T>* __restrict__ w, const Compute<T>* __restrict__ means,
                                                             const Compute<T>* __restrict__ inverses, const T* __restrict__ g, T* __restrict__ dx,
                                                             Compute<T>* __restrict__ partial_w, Compute<T>* __restrict__ partial_b) {
  using C = Compute<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ C room[2][32];
  const int step = static_cast<int>(blockDim.x) * Width, first = static_cast<int>(threadIdx.x) * Width;
  C dw[Packs][Width] = {};
  C db[Centre ? Packs : 1][Centre ? Width : 1] = {};
  const std::int64_t groups = (rows + blockDim.y - 1) / blockDim.y;
  for (std::int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const std::int64_t row = group * blockDim.y + threadIdx.y;
    const bool live = row < rows;
    Pack<T, Width> xs[Packs], gs[Packs];
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (live && first + p * step < cols) {
        xs[p] = load_pack<T, Width>(x + row * cols + first + p * step);
        gs[p] = load_pack<T, Width>(g + row * cols + first + p * step);
      }
    const C inverse = live ? inverses[row] : C(0);
    C mean = 0;
    if constexpr (Centre) mean = live ? means[row] : C(0);
    C dot = 0, total = 0;
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (live && first + p * step < cols) {
        C scale[Width];
        load_wide<C, Width>(w + first + p * step, scale);
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          const C unit = (widen(xs[p].v[i]) - mean) * inverse, grad = widen(gs[p].v[i]);
          dw[p][i] += grad * unit;
          dot += grad * scale[i] * unit;
          if constexpr (Centre) db[p][i] += grad, total += grad * scale[i];
        }
      }
    if (dx == nullptr) continue;
    dot = row_reduce(dot, Sum{}, room[0]) * per;
    if constexpr (Centre) total = row_reduce(total, Sum{}, room[1]) * per;
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (live && first + p * step < cols) {
        C scale[Width], out[Width];
        load_wide<C, Width>(w + first + p * step, scale);
#pragma unroll
        for (int i = 0; i < Width; ++i)
          out[i] = inverse * (widen(gs[p].v[i]) * scale[i] - (widen(xs[p].v[i]) - mean) * inverse * dot - total);
        store_pack<T, Width>(dx + row * cols + first + p * step, out);
      }
  }
  // The block's rows of threads add up in order, through shared memory.
  const auto leave = [&](auto& sums, C* partial) {
    if (partial == nullptr) return;
    C* to = partial + static_cast<std::int64_t>(blockIdx.x) * cols;
    C* pool = reinterpret_cast<C*>(shared);  // [blockDim.y, cols]; empty when blockDim.y is 1
    if (blockDim.y == 1) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (first + p * step < cols)
#pragma unroll
          for (int i = 0; i < Width; ++i) to[first + p * step + i] = sums[p][i];
      return;
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < Packs; ++p)
      if (first + p * step < cols)
#pragma unroll
        for (int i = 0; i < Width; ++i) pool[threadIdx.y * cols + first + p * step + i] = sums[p][i];
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); c < cols; c += static_cast<int>(blockDim.x * blockDim.y)) {
      C s = 0;
      for (unsigned r = 0; r < blockDim.y; ++r) s += pool[r * cols + c];
      to[c] = s;
    }
  };
  leave(dw, partial_w);
  if constexpr (Centre) leave(db, partial_b);
}

/// Rows too long for registers: x and g are read twice (the second time mostly from the cache), and the sums for the
/// weights are added in place.
template <class T, bool Centre, int Width>
__global__ void __launch_bounds__(row_threads) norm_backward_long_kernel(std::int64_t rows, int cols, Compute<T> per, const T* __restrict__ x,
                                                                  const Compute<T>* __restrict__ w, const Compute<T>* __restrict__ means,
                                                                  const Compute<T>* __restrict__ inverses, const T* __restrict__ g, T* __restrict__ dx,
                                                                  Compute<T>* __restrict__ partial_w, Compute<T>* __restrict__ partial_b) {
  using C = Compute<T>;
  __shared__ C room[2][32];
  const int step = static_cast<int>(blockDim.x) * Width, first = static_cast<int>(threadIdx.x) * Width;
  C* to_w = partial_w == nullptr ? nullptr : partial_w + static_cast<std::int64_t>(blockIdx.x) * cols;
  C* to_b = !Centre || partial_b == nullptr ? nullptr : partial_b + static_cast<std::int64_t>(blockIdx.x) * cols;
  bool fresh = true;
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x, fresh = false) {
    const C inverse = inverses[row];
    C mean = 0, dot = 0, total = 0;
    if constexpr (Centre) mean = means[row];
    for (int c = first; c < cols; c += step) {
      const Pack<T, Width> xs = load_pack<T, Width>(x + row * cols + c), gs = load_pack<T, Width>(g + row * cols + c);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const C unit = (widen(xs.v[i]) - mean) * inverse, grad = widen(gs.v[i]);
        dot += grad * w[c + i] * unit;
        if constexpr (Centre) total += grad * w[c + i];
        if (to_w != nullptr) to_w[c + i] = (fresh ? C(0) : to_w[c + i]) + grad * unit;
        if (to_b != nullptr) to_b[c + i] = (fresh ? C(0) : to_b[c + i]) + grad;
      }
    }
    if (dx == nullptr) continue;
    dot = row_reduce(dot, Sum{}, room[0]) * per;
    if constexpr (Centre) total = row_reduce(total, Sum{}, room[1]) * per;
    for (int c = first; c < cols; c += step) {
      const Pack<T, Width> xs = load_pack<T, Width>(x + row * cols + c), gs = load_pack<T, Width>(g + row * cols + c);
      C out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i)
        out[i] = inverse * (widen(gs.v[i]) * w[c + i] - (widen(xs.v[i]) - mean) * inverse * dot - total);
      store_pack<T, Width>(dx + row * cols + c, out);
    }
  }
}

template <bool Centre>
void norm(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, const void* b, double epsilon, void* y,
          void* mean, void* inverse) {
  if (rows == 0 || cols == 0) return;
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    const RowPlan plan = plan_rows(cols, sizeof(T), cols % width == 0 && all_on_16(x, w, b, y));
    by_plan<T>(plan, std::integer_sequence<int, 0, 1, 2, 4>{}, [&](auto wide, auto packs) {
      norm_kernel<T, Centre, decltype(wide)::value, decltype(packs)::value>
          <<<static_cast<unsigned>(ceil_div(rows, plan.rows)), dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), 0, ctx.stream()>>>(
              rows, static_cast<int>(cols), C(1) / static_cast<C>(cols), static_cast<const T*>(x), static_cast<const C*>(w), static_cast<const C*>(b), static_cast<C>(epsilon), static_cast<T*>(y),
              static_cast<C*>(mean), static_cast<C*>(inverse));
      check(cudaGetLastError(), Centre ? "layer_norm" : "rms_norm");
    });
  });
}

template <bool Centre>
void norm_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, const void* mean, const void* inverse,
                   const void* g, void* dx, void* partial_w, void* partial_b) {
  if (cols == 0) return;
  const char* name = Centre ? "layer_norm_backward" : "rms_norm_backward";
  const std::int64_t blocks = norm_backward_blocks(rows, cols);
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    if (rows == 0) {
      for (void* p : {partial_w, partial_b})
        if (p != nullptr) check(cudaMemsetAsync(p, 0, static_cast<std::size_t>(blocks * cols) * sizeof(C), ctx.stream()), name);
      return;
    }
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    const RowPlan plan = plan_rows(cols, sizeof(T), cols % width == 0 && all_on_16(x, w, g, dx), 2);
    const auto arguments = [&](auto kernel, dim3 block, std::int64_t shared) {
      kernel<<<static_cast<unsigned>(blocks), block, static_cast<unsigned>(shared), ctx.stream()>>>(
          rows, static_cast<int>(cols), C(1) / static_cast<C>(cols), static_cast<const T*>(x), static_cast<const C*>(w), static_cast<const C*>(mean), static_cast<const C*>(inverse),
          static_cast<const T*>(g), static_cast<T*>(dx), static_cast<C*>(partial_w), static_cast<C*>(partial_b));
      check(cudaGetLastError(), name);
    };
    if (plan.packs == 0) {
      if (plan.width == 1) arguments(norm_backward_long_kernel<T, Centre, 1>, dim3(row_threads), 0);
      else arguments(norm_backward_long_kernel<T, Centre, width>, dim3(row_threads), 0);
      return;
    }
    by_plan<T>(plan, std::integer_sequence<int, 1, 2>{}, [&](auto wide, auto packs) {
      arguments(norm_backward_kernel<T, Centre, decltype(wide)::value, decltype(packs)::value>,
                dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), plan.rows > 1 ? plan.rows * cols * static_cast<std::int64_t>(sizeof(C)) : 0);
    });
  });
}

}  // namespace

std::int64_t norm_blocks(Context&, std::int64_t rows, std::int64_t cols) { return norm_backward_blocks(rows, cols); }

void rms_norm(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, double epsilon, void* y, void* inverse) {
  norm<false>(ctx, num, rows, cols, x, w, nullptr, epsilon, y, nullptr, inverse);
}

void rms_norm_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, const void* inverse,
                       const void* g, void* dx, void* partial) {
  norm_backward<false>(ctx, num, rows, cols, x, w, nullptr, inverse, g, dx, partial, nullptr);
}

void layer_norm(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, const void* b, double epsilon,
                void* y, void* mean, void* inverse) {
  norm<true>(ctx, num, rows, cols, x, w, b, epsilon, y, mean, inverse);
}

void layer_norm_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* w, const void* mean,
                         const void* inverse, const void* g, void* dx, void* partial_w, void* partial_b) {
  norm_backward<true>(ctx, num, rows, cols, x, w, mean, inverse, g, dx, partial_w, partial_b);
}

}  // namespace capstan::kernels::cuda
