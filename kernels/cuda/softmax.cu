// softmax and log_softmax over rows: a row is read once and stays in registers; long rows are read again.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/rows.h>

namespace capstan::kernels::cuda {

namespace {

template <class T, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 2) softmax_kernel(std::int64_t rows, int cols, const T* __restrict__ x, T* __restrict__ y, bool logarithm) {
  using C = Compute<T>;
  __shared__ Highest<C> room_top[64];
  __shared__ Sums<C, 1> room_sum[64];
  RowReducer<Highest<C>> highest{room_top};
  RowReducer<Sums<C, 1>> total{room_sum};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  for (std::int64_t base = static_cast<std::int64_t>(blockIdx.x) * blockDim.y; base < rows; base += stride) {
    const std::int64_t row = base + threadIdx.y;
    Row<T, Width, Packs> r;
    r.load(x + row * cols, row < rows, cols);
    C top = lowest<C>(), sum = 0;
    r.sweep(cols, [&](int, int, const Pack<T, Width>& v) {
#pragma unroll
      for (int i = 0; i < Width; ++i) top = Max{}(top, widen(v.v[i]));
    });
    top = highest({top}).v;
    C kept[r.held][Width];  // of rows in registers, so that each exponential is taken once
    r.sweep(cols, [&](int p, int, const Pack<T, Width>& v) {
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const C e = exp_of(widen(v.v[i]) - top);
        if constexpr (Packs > 0) kept[p][i] = e;
        sum += e;
      }
    });
    sum = total({{sum}}).v[0];
    const C less = top + log_of(sum), by = C(1) / sum;
    r.sweep(cols, [&](int p, int c, const Pack<T, Width>& v) {
      C out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        if (logarithm) out[i] = widen(v.v[i]) - less;
        else if constexpr (Packs > 0) out[i] = kept[p][i] * by;
        else out[i] = exp_of(widen(v.v[i]) - top) * by;
      }
      store_pack<T, Width>(y + row * cols + c, out);
    });
  }
}

template <class T, int Width, int Packs>
__global__ void __launch_bounds__(row_threads, 2) softmax_backward_kernel(std::int64_t rows, int cols, const T* __restrict__ y, const T* __restrict__ g,
                                                                          T* __restrict__ dx, bool logarithm) {
  using C = Compute<T>;
  __shared__ Sums<C, 1> room[64];
  RowReducer<Sums<C, 1>> reduce{room};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  for (std::int64_t base = static_cast<std::int64_t>(blockIdx.x) * blockDim.y; base < rows; base += stride) {
    const std::int64_t row = base + threadIdx.y;
    Row<T, Width, Packs> ys, gs;
    ys.load(y + row * cols, row < rows, cols), gs.load(g + row * cols, row < rows, cols);
    const auto both = [&](auto&& f) {
      ys.sweep(cols, [&](int p, int c, const Pack<T, Width>& a) {
        if constexpr (Packs > 0) f(c, a, gs.raw[p]);
        else f(c, a, load_pack<T, Width>(gs.from + c));
      });
    };
    C total = 0;
    both([&](int, const Pack<T, Width>& a, const Pack<T, Width>& b) {
#pragma unroll
      for (int i = 0; i < Width; ++i) total += logarithm ? widen(b.v[i]) : widen(b.v[i]) * widen(a.v[i]);
    });
    total = reduce({{total}}).v[0];
    both([&](int c, const Pack<T, Width>& a, const Pack<T, Width>& b) {
      C out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i)
        out[i] = logarithm ? widen(b.v[i]) - exp_of(widen(a.v[i])) * total : widen(a.v[i]) * (widen(b.v[i]) - total);
      store_pack<T, Width>(dx + row * cols + c, out);
    });
  }
}

}  // namespace

void softmax(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) {
  if (rows == 0 || cols == 0) return;
  visit(num, [&]<class T>() {
    const RowPlan plan = rows_for<T>(cols, all_on_16(x, y), 2);
    by_plan<T>(plan, [&](auto width, auto packs) {
      constexpr int count = decltype(packs)::value < 3 ? decltype(packs)::value : 0;
      launch_block(ctx, "softmax", softmax_kernel<T, decltype(width)::value, count>, dim3(static_cast<unsigned>(walking_blocks(ctx.multiprocessors(), plan, rows, 4096))),
                   dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), 0, rows, static_cast<int>(cols), static_cast<const T*>(x), static_cast<T*>(y), logarithm);
    });
  });
}

void softmax_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) {
  if (rows == 0 || cols == 0) return;
  visit(num, [&]<class T>() {
    const RowPlan plan = rows_for<T>(cols, all_on_16(y, g, dx), 2);
    by_plan<T>(plan, [&](auto width, auto packs) {
      constexpr int count = decltype(packs)::value < 3 ? decltype(packs)::value : 0;
      launch_block(ctx, "softmax_backward", softmax_backward_kernel<T, decltype(width)::value, count>, dim3(static_cast<unsigned>(walking_blocks(ctx.multiprocessors(), plan, rows, 4096))),
                   dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows)), 0, rows, static_cast<int>(cols), static_cast<const T*>(y), static_cast<const T*>(g), static_cast<T*>(dx), logarithm);
    });
  });
}

}  // namespace capstan::kernels::cuda
