// defines: column_sum(): sums of columns in a fixed order, for the gradients of biases.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <algorithm>
#include <cstdint>

namespace capstan::kernels::cpu {

/// to[c] (+)= sum_r from[r * stride + c]. Rows are added in order whatever the number of threads.
template <class T, class A = Compute<T>>
void column_sum(Context& context, const T* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, A* to, bool accumulate) {
  using V = Vec<A>;
  constexpr std::int64_t block = 8 * V::lanes;
#pragma omp parallel for num_threads(context.threads()) schedule(static)
  for (std::int64_t c0 = 0; c0 < cols; c0 += block) {
    const std::int64_t n = std::min(block, cols - c0), vectors = (n + V::lanes - 1) / V::lanes;
    V sum[8];
    for (std::int64_t v = 0; v < vectors; ++v) sum[v] = V(A(0));
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* row = from + r * stride + c0;
      if (n == block) for (std::int64_t v = 0; v < 8; ++v) sum[v] = sum[v] + V::load(row + v * V::lanes);
      else for_blocks<A>(n, [&](std::int64_t i, auto m) { sum[i / V::lanes] = sum[i / V::lanes] + V::load(row + i, m); });
    }
    for_blocks<A>(n, [&](std::int64_t i, auto m) {
      V s = sum[i / V::lanes];
      if (accumulate) s = V::load(to + c0 + i, m) + s;
      s.store(to + c0 + i, m);
    });
  }
}

}  // namespace capstan::kernels::cpu
