// defines: parallel_ranges: static cuts of a range over a context's threads.
#pragma once
#include <kernels/cpu/context.h>

#include <omp.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// Calls f(begin, end) for a cut of [0, n) into at most ctx.threads() ranges whose bounds are multiples of
/// `grain`. What f does for an index must not depend on the cut.
template <class F>
void parallel_ranges(Context& ctx, std::int64_t n, std::int64_t grain, F&& f) {
  const std::int64_t grains = (n + grain - 1) / grain;
  const int threads = static_cast<int>(grains < ctx.threads() ? grains : ctx.threads());
  if (threads <= 1) {
    if (n > 0) f(std::int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const std::int64_t begin = grains * me / team * grain, stop = grains * (me + 1) / team * grain;
    const std::int64_t end = stop < n ? stop : n;
    if (begin < end) f(begin, end);
  }
}

/// Rows that make a task worth a thread when each has `cols` elements.
inline std::int64_t row_grain(std::int64_t cols) {
  const std::int64_t rows = 8192 / (cols < 1 ? 1 : cols);
  return rows < 1 ? 1 : rows;
}

}  // namespace capstan::kernels::cpu
