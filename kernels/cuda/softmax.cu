// softmax and log_softmax over rows: a row is read once and stays in registers; long rows are read again.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/rows.h>

namespace capstan::kernels::cuda {

namespace {

/// A row's packs in registers, or read again for each sweep when Packs is 0. f(column, values).
template <class T, int Width, int Packs>
struct Row {
  static constexpr int held = Packs > 0 ? Packs : 1;
  const T* from;
  int cols, first, step;
  bool live;
  Pack<T, Width> raw[held];

  __device__ Row(const T* from_in, int cols_in, bool live_in)
      : from(from_in), cols(cols_in), first(static_cast<int>(threadIdx.x) * Width), step(static_cast<int>(blockDim.x) * Width), live(live_in) {
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (live && first + p * step < cols) raw[p] = load_pack<T, Width>(from + first + p * step);
    }
  }
  template <class F>
  __device__ __forceinline__ void sweep(F&& f) const {
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (live && first + p * step < cols) f(first + p * step, raw[p]);
    } else {
      if (live)
        for (int c = first; c < cols; c += step) f(c, load_pack<T, Width>(from + c));
    }
  }
};

template <class T, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 2) softmax_kernel(std::int64_t rows, int cols, const T* __restrict__ x, T* __restrict__ y, bool logarithm) {
  using C = Compute<T>;
  __shared__ C room[32];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const Row<T, Width, Packs> r(x + row * cols, cols, row < rows);
  C top = lowest<C>();
  r.sweep([&](int, const Pack<T, Width>& v) {
#pragma unroll
    for (int i = 0; i < Width; ++i) top = Max{}(top, widen(v.v[i]));
  });
  top = row_reduce(top, Max{}, room);
  C sum = 0;
  r.sweep([&](int, const Pack<T, Width>& v) {
#pragma unroll
    for (int i = 0; i < Width; ++i) sum += exp_of(widen(v.v[i]) - top);
  });
  sum = row_reduce(sum, Sum{}, room);
  const C less = top + log_of(sum), by = C(1) / sum;
  r.sweep([&](int c, const Pack<T, Width>& v) {
    C out[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) out[i] = logarithm ? widen(v.v[i]) - less : exp_of(widen(v.v[i]) - top) * by;
    store_pack<T, Width>(y + row * cols + c, out);
  });
}

template <class T, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 1) softmax_backward_kernel(std::int64_t rows, int cols, const T* __restrict__ y, const T* __restrict__ g,
                                                                          T* __restrict__ dx, bool logarithm) {
  using C = Compute<T>;
  __shared__ C room[32];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const Row<T, Width, Packs> ys(y + row * cols, cols, row < rows), gs(g + row * cols, cols, row < rows);
  const auto both = [&](auto&& f) {
    if constexpr (Packs > 0) {
#pragma unroll
      for (int p = 0; p < Packs; ++p)
        if (ys.live && ys.first + p * ys.step < cols) f(ys.first + p * ys.step, ys.raw[p], gs.raw[p]);
    } else {
      if (ys.live)
        for (int c = ys.first; c < cols; c += ys.step) f(c, load_pack<T, Width>(ys.from + c), load_pack<T, Width>(gs.from + c));
    }
  };
  C total = 0;
  both([&](int, const Pack<T, Width>& a, const Pack<T, Width>& b) {
#pragma unroll
    for (int i = 0; i < Width; ++i) total += logarithm ? widen(b.v[i]) : widen(b.v[i]) * widen(a.v[i]);
  });
  total = row_reduce(total, Sum{}, room);
  both([&](int c, const Pack<T, Width>& a, const Pack<T, Width>& b) {
    C out[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i)
      out[i] = logarithm ? widen(b.v[i]) - exp_of(widen(a.v[i])) * total : widen(a.v[i]) * (widen(b.v[i]) - total);
    store_pack<T, Width>(dx + row * cols + c, out);
  });
}

template <class T, class F>
void by_plan(const RowPlan& plan, F&& f) {
  const auto packs = [&]<int Width>(std::integral_constant<int, Width> width) {
    if (plan.packs == 0) f(width, std::integral_constant<int, 0>{});
    else if (plan.packs == 1) f(width, std::integral_constant<int, 1>{});
    else if (plan.packs == 2) f(width, std::integral_constant<int, 2>{});
    else f(width, std::integral_constant<int, 4>{});
  };
  if (plan.width == 1) packs(std::integral_constant<int, 1>{});
  else packs(std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>{});
}

}  // namespace

void softmax(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) {
  if (rows == 0 || cols == 0) return;
  visit(num, [&]<class T>() {
    const RowPlan plan = plan_rows(cols, sizeof(T), cols % (16 / static_cast<int>(sizeof(T))) == 0 && all_on_16(x, y));
    by_plan<T>(plan, [&](auto width, auto packs) {
      softmax_kernel<T, decltype(width)::value, decltype(packs)::value>
          <<<static_cast<unsigned>(ceil_div(rows, plan.rows)), dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), 0, ctx.stream()>>>(
              rows, static_cast<int>(cols), static_cast<const T*>(x), static_cast<T*>(y), logarithm);
    });
    check(cudaGetLastError(), "softmax");
  });
}

void softmax_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) {
  if (rows == 0 || cols == 0) return;
  visit(num, [&]<class T>() {
    const RowPlan plan = plan_rows(cols, sizeof(T), cols % (16 / static_cast<int>(sizeof(T))) == 0 && all_on_16(y, g, dx));
    by_plan<T>(plan, [&](auto width, auto packs) {
      softmax_backward_kernel<T, decltype(width)::value, decltype(packs)::value>
          <<<static_cast<unsigned>(ceil_div(rows, plan.rows)), dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), 0, ctx.stream()>>>(
              rows, static_cast<int>(cols), static_cast<const T*>(y), static_cast<const T*>(g), static_cast<T*>(dx), logarithm);
    });
    check(cudaGetLastError(), "softmax_backward");
  });
}

}  // namespace capstan::kernels::cuda
