// Activations: one read and one write; the backward recomputes from the saved input.
#include <kernels/cpu/activation.h>
#include <kernels/cpu/column_sum.h>
#include <kernels/cpu/elementwise.h>

#include <algorithm>

namespace capstan::kernels::cpu {

template <class T> void gelu(Context& ctx, std::int64_t n, const T* x, T* y) {
  map1(ctx, n, x, y, [](auto v) { return gelu_of(v); });
}
template <class T> void gelu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx) {
  map2(ctx, n, x, g, dx, [](auto v, auto grad) { return grad * gelu_slope(v); });
}
template <class T>
void gelu_backward_sum(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const T* g, T* dx, Compute<T>* sum, bool accumulate) {
  using C = Compute<T>;
  using V = Vec<C>;
  const std::int64_t wide = columns_of_a_share<C>(ctx, cols);
#pragma omp parallel for num_threads(ctx.threads()) schedule(static)
  for (std::int64_t c0 = 0; c0 < cols; c0 += wide) {
    const std::int64_t n = std::min(wide, cols - c0);
    alignas(64) C sums[most_columns] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = r * cols + c0, ahead = at + cols;
      for_blocks<C>(n, [&](std::int64_t i, auto m) {
        __builtin_prefetch(x + ahead + i, 0, 3);
        __builtin_prefetch(g + ahead + i, 0, 3);
        __builtin_prefetch(dx + ahead + i, 1, 3);
        (V::load(g + at + i, m) * gelu_slope(V::load(x + at + i, m))).store(dx + at + i, m);
        (V::load(sums + i, m) + V::load(dx + at + i, m)).store(sums + i, m);  // what was stored: bf16 is summed rounded
      });
    }
    for_blocks<C>(n, [&](std::int64_t i, auto m) {
      const V s = V::load(sums + i, m);
      (accumulate ? V::load(sum + c0 + i, m) + s : s).store(sum + c0 + i, m);
    });
  }
}
template <class T> void silu(Context& ctx, std::int64_t n, const T* x, T* y) {
  map1(ctx, n, x, y, [](auto v) { return silu_of(v); });
}
template <class T> void silu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx) {
  map2(ctx, n, x, g, dx, [](auto v, auto grad) { return grad * silu_slope(v); });
}

template <class T> void swiglu(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, T* y) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(2 * width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T *gate = gate_up + r * 2 * width, *up = gate + width;
      T* to = y + r * width;
      for_blocks<C>(width, [=](std::int64_t i, auto m) { (silu_of(V::load(gate + i, m)) * V::load(up + i, m)).store(to + i, m); });
    }
  });
}

template <class T>
void swiglu_backward(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, const T* g, T* dx) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(2 * width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T *gate = gate_up + r * 2 * width, *up = gate + width, *grad = g + r * width;
      T *d_gate = dx + r * 2 * width, *d_up = d_gate + width;
      for_blocks<C>(width, [=](std::int64_t i, auto m) {
        const V x = V::load(gate + i, m), u = V::load(up + i, m), d = V::load(grad + i, m);
        const V one(C(1)), s = sigmoid(x);
        (d * (x * s)).store(d_up + i, m);
        (d * u * (s * fma(x, one - s, one))).store(d_gate + i, m);
      });
    }
  });
}

#define INSTANTIATE(T)                                                                            \
  template void gelu(Context&, std::int64_t, const T*, T*);                                       \
  template void gelu_backward(Context&, std::int64_t, const T*, const T*, T*);                    \
  template void gelu_backward_sum(Context&, std::int64_t, std::int64_t, const T*, const T*, T*,   \
                                  Compute<T>*, bool);                                             \
  template void silu(Context&, std::int64_t, const T*, T*);                                       \
  template void silu_backward(Context&, std::int64_t, const T*, const T*, T*);                    \
  template void swiglu(Context&, std::int64_t, std::int64_t, const T*, T*);                       \
  template void swiglu_backward(Context&, std::int64_t, std::int64_t, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
