// Launch plans: plain arithmetic, tested without a GPU (tests/kernels/cuda).
#include <kernels/cuda/rows_plan.h>

#include <algorithm>

namespace capstan::kernels::cuda {

RowPlan plan_rows(std::int64_t cols, int element_bytes, bool vector) { return plan_rows(cols, element_bytes, vector, 4); }

RowPlan plan_rows(std::int64_t cols, int element_bytes, bool vector, int most_packs) {
  RowPlan p;
  p.width = vector ? 16 / element_bytes : 1;
  const std::int64_t packs = ceil_div(std::max<std::int64_t>(cols, 1), p.width);
  // Few packs a thread keep many rows in flight; a row's threads grow before its packs do.
  for (int threads = 32; threads <= row_threads; threads *= 2) {
    const int enough = threads == row_threads ? most_packs : std::min(2, most_packs);
    if (packs > static_cast<std::int64_t>(threads) * enough) continue;
    p.threads = threads;
    p.packs = 1;
    while (static_cast<std::int64_t>(p.packs) * threads < packs) p.packs *= 2;
    break;
  }
  if (p.packs == 0) p.threads = row_threads;
  p.rows = std::max(1, 128 / p.threads);
  return p;
}

std::int64_t norm_backward_blocks(std::int64_t rows, std::int64_t cols) {
  // Enough to fill 132 multiprocessors some times over; every block costs one row of partial sums.
  const std::int64_t most = cols <= 1024 ? 792 : cols <= 8192 ? 528 : 264;
  const std::int64_t at_once = cols <= 1024 ? 4 : 1;
  return std::clamp<std::int64_t>(ceil_div(rows, at_once * 4), 1, most);
}

ScorePlan plan_scores(std::int64_t cols, int compute_bytes, bool keep) {
  ScorePlan p;
  const std::int64_t room = 104 * 1024 / compute_bytes;  // two blocks to a multiprocessor of 228 KiB
  while (p.cluster < 8 && ceil_div(cols, p.cluster) > room) p.cluster *= 2;
  const std::int64_t align = 16 / 2;  // slices begin on 16 bytes in 16-bit outputs too
  p.slice = ceil_div(ceil_div(cols, p.cluster), align) * align;
  const std::int64_t most = 208 * 1024 / compute_bytes;
  p.cached = keep ? std::min(p.slice, most) : 0;
  p.shared_bytes = p.cached * compute_bytes;
  return p;
}

ScatterPlan plan_scatter(std::int64_t count, std::int64_t cols, int compute_bytes, std::int64_t sort_bytes) {
  ScatterPlan p;
  const auto place = [&](std::int64_t bytes) {
    const std::int64_t at = p.workspace;
    p.workspace += ceil_div(bytes, 256) * 256;
    return at;
  };
  p.chunks = ceil_div(count, ScatterPlan::chunk);
  p.keys = place(count * 4);
  p.ids = place(count * 4);
  p.order = place(count * 4 * 2);
  p.partial = place(2 * p.chunks * cols * compute_bytes);
  p.sort = place(sort_bytes);
  return p;
}

}  // namespace capstan::kernels::cuda
