// Row softmax: one row stays in cache over its three sweeps.
#include <kernels/cpu/rows.h>
#include <kernels/cpu/softmax.h>

#include <cmath>
#include <limits>

namespace capstan::kernels::cpu {

template <class T>
void softmax(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, T* y_all, bool logarithm) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* x = x_all + r * cols;
      T* y = y_all + r * cols;
      const C lowest = -std::numeric_limits<C>::infinity();
      V top(lowest);
      std::int64_t i = 0;
      for (; i + V::lanes <= cols; i += V::lanes) top = max(top, V::load(x + i));
      if (i < cols) top = max(top, V::load_partial(x + i, static_cast<int>(cols - i), lowest));
      const V shift(reduce_max(top));
      const C total = sum_blocks<C>(cols, [=](std::int64_t k, auto m) {
        if constexpr (std::is_same_v<decltype(m), Part>) return exp(V::load_partial(x + k, m.n, lowest) - shift);
        else return exp(V::load(x + k, m) - shift);
      });
      if (logarithm) {
        const V less = shift + log(V(total));
        for_blocks<C>(cols, [=](std::int64_t k, auto m) { (V::load(x + k, m) - less).store(y + k, m); });
      } else {
        const V by(C(1) / total);
        for_blocks<C>(cols, [=](std::int64_t k, auto m) { (exp(V::load(x + k, m) - shift) * by).store(y + k, m); });
      }
    }
  });
}

template <class T>
void softmax_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* y_all, const T* g_all, T* dx_all,
                      bool logarithm) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T *y = y_all + r * cols, *g = g_all + r * cols;
      T* dx = dx_all + r * cols;
      if (logarithm) {
        const V total(sum_blocks<C>(cols, [=](std::int64_t k, auto m) { return V::load(g + k, m); }));
        for_blocks<C>(cols, [=](std::int64_t k, auto m) {
          fma(-exp(V::load(y + k, m)), total, V::load(g + k, m)).store(dx + k, m);
        });
      } else {
        const V total(sum_blocks<C>(cols, [=](std::int64_t k, auto m) { return V::load(g + k, m) * V::load(y + k, m); }));
        for_blocks<C>(cols, [=](std::int64_t k, auto m) { (V::load(y + k, m) * (V::load(g + k, m) - total)).store(dx + k, m); });
      }
    }
  });
}

#define INSTANTIATE(T)                                                                       \
  template void softmax(Context&, std::int64_t, std::int64_t, const T*, T*, bool);           \
  template void softmax_backward(Context&, std::int64_t, std::int64_t, const T*, const T*, T*, bool);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
