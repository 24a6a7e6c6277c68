// Launch plans: plain arithmetic, tested without a GPU (tests/kernels/cuda).
#include <kernels/cuda/rows_plan.h>

#include <algorithm>
#include <initializer_list>

namespace capstan::kernels::cuda {

RowPlan plan_rows(std::int64_t cols, int element_bytes, bool vector, int most_packs) {
  RowPlan p;
  if (vector) {
    p.width = 16 / element_bytes;
    const std::int64_t packs = ceil_div(std::max<std::int64_t>(cols, 1), p.width);
    // Of all shapes the one with the fewest idle lanes; of equals the one with the fewest threads a row.
    double best = 0;
    for (const int count : {1, 2, 3, 4}) {
      if (count > most_packs) break;
      std::int64_t threads = ceil_div(packs, count);
      if (threads > row_threads) continue;
      if (threads > 32) {
        threads = ceil_div(threads, 32) * 32;
      } else {
        std::int64_t power = 8;
        while (power < threads) power *= 2;
        threads = power;
      }
      const double busy = static_cast<double>(packs) / static_cast<double>(threads * count);
      if (busy < best - 1e-9) continue;
      best = busy, p.packs = count, p.threads = static_cast<int>(threads);
    }
  }
  if (p.packs == 0) p.threads = cols <= 64 ? 32 : cols <= 1024 ? 128 : row_threads;
  p.rows = std::max(1, 128 / p.threads);
  return p;
}

std::int64_t walking_blocks(std::int64_t multiprocessors, const RowPlan& plan, std::int64_t rows, std::int64_t threads_at_once) {
  const std::int64_t each = std::max<std::int64_t>(1, threads_at_once / (plan.threads * plan.rows));
  return std::min(ceil_div(rows, plan.rows), multiprocessors * each);
}

std::int64_t norm_backward_blocks(std::int64_t rows, std::int64_t cols) {
  // As many as 132 multiprocessors hold at once; every block costs one row of partial sums.
  const std::int64_t most = cols <= 1024 ? 1056 : cols <= 2048 ? 528 : cols <= 4096 ? 264 : 132;
  return std::clamp<std::int64_t>(ceil_div(rows, cols <= 1024 ? 16 : 4), 1, most);
}

ScorePlan plan_scores(std::int64_t cols, int compute_bytes, bool keep) {
  ScorePlan p;
  p.slice = cols;
  if (!keep) return p;  // one pass: one block goes over the row
  const std::int64_t room = 72 * 1024 / compute_bytes;  // three blocks to a multiprocessor of 228 KiB
  while (p.cluster < 8 && ceil_div(cols, p.cluster) > room) p.cluster *= 2;
  const std::int64_t align = 8;  // slices begin on 16 bytes in 16-bit outputs too
  p.slice = ceil_div(ceil_div(cols, p.cluster), align) * align;
  p.cached = std::min<std::int64_t>(p.slice, 208 * 1024 / compute_bytes);
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
