// defines: column_sum(): sums of columns in a fixed order, for the gradients of biases.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <algorithm>
#include <cstdint>

namespace capstan::kernels::cpu {

/// The most columns whose sums a thread keeps at once (in the first-level cache).
constexpr std::int64_t most_columns = 1024;

/// How threads share sums of columns: a share is all rows of this many columns (whole vectors), so that a sum has one order
/// whatever the number of threads; as wide as may be, so that rows come in runs.
template <class A> std::int64_t columns_of_a_share(const Context& context, std::int64_t cols) {
  const std::int64_t team = context.threads(), shares = (std::max(team, (cols + most_columns - 1) / most_columns) + team - 1) / team * team;
  const std::int64_t even = std::max<std::int64_t>(1, (cols + shares - 1) / shares);
  return (even + Vec<A>::lanes - 1) / Vec<A>::lanes * Vec<A>::lanes;
}

/// to[c] (+)= sum_r from[r * stride + c]. Rows are added in order whatever the number of threads.
template <class T, class A = Compute<T>>
void column_sum(Context& context, const T* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, A* to, bool accumulate) {
  using V = Vec<A>;
  const std::int64_t wide = columns_of_a_share<A>(context, cols);
#pragma omp parallel for num_threads(context.threads()) schedule(static)
  for (std::int64_t c0 = 0; c0 < cols; c0 += wide) {
    const std::int64_t n = std::min(wide, cols - c0);
    alignas(64) A sums[most_columns] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* row = from + r * stride + c0;
      for_blocks<A>(n, [&](std::int64_t i, auto m) {
        __builtin_prefetch(row + 4 * stride + i, 0, 3);  // measured: 38 GB/s of short rows, 27 without
        (V::load(sums + i, m) + V::load(row + i, m)).store(sums + i, m);
      });
    }
    for_blocks<A>(n, [&](std::int64_t i, auto m) {
      const V s = V::load(sums + i, m);
      (accumulate ? V::load(to + c0 + i, m) + s : s).store(to + c0 + i, m);
    });
  }
}

}  // namespace capstan::kernels::cpu
