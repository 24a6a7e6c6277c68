// Rotary embedding. Angles are made in f64: at position 100,000 an f32 angle is wrong by 0.004.
#include <kernels/cpu/rope.h>
#include <kernels/cpu/rows.h>

#include <cmath>
#include <vector>

namespace capstan::kernels::cpu {

template <class T>
void rope_table(Context& ctx, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, T* table) {
  const std::int64_t half = size / 2;
  std::vector<double> rates(static_cast<std::size_t>(half));
  for (std::int64_t i = 0; i < half; ++i)
    rates[static_cast<std::size_t>(i)] = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(size));
  const double* rate = rates.data();
  parallel_ranges(ctx, rows, row_grain(size * 16), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(positions[t]) * rate[i];
        table[t * size + i] = static_cast<T>(std::cos(angle));
        table[t * size + half + i] = static_cast<T>(std::sin(angle));
      }
  });
}

template <class T>
void rope(Context& ctx, std::int64_t rows, std::int64_t heads, std::int64_t size, const T* x, std::int64_t stride,
          const Compute<T>* table, T* y, bool inverse) {
  using C = Compute<T>;
  using V = Vec<C>;
  const std::int64_t half = size / 2;
  parallel_ranges(ctx, rows, row_grain(heads * size), [=](std::int64_t begin, std::int64_t end) {
    const V sign(inverse ? C(-1) : C(1));
    for (std::int64_t t = begin; t < end; ++t) {
      const C *cosine = table + t * size, *sine = cosine + half;
      for (std::int64_t h = 0; h < heads; ++h) {
        const T* from = x + t * stride + h * size;
        T* to = y + (t * heads + h) * size;
        for_blocks<C>(half, [=](std::int64_t i, auto m) {
          const V a = V::load(from + i, m), b = V::load(from + half + i, m);
          const V c = V::load(cosine + i, m), s = V::load(sine + i, m) * sign;
          fma(a, c, -(b * s)).store(to + i, m);
          fma(b, c, a * s).store(to + half + i, m);
        });
      }
    }
  });
}

template void rope_table(Context&, std::int64_t, std::int64_t, double, const std::int32_t*, double*);
template void rope_table(Context&, std::int64_t, std::int64_t, double, const std::int32_t*, float*);
#define INSTANTIATE(T)                                                                                        \
  template void rope(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, std::int64_t, const Compute<T>*, T*, bool);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
