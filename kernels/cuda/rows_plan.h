// defines: the launch plans of row kernels: how many threads, blocks and bytes of workspace a shape takes. Plain host
// code; what sums are made of depends on shapes alone (never on the device), so that they have one order on every chip.
#pragma once
#include <cstdint>

namespace capstan::kernels::cuda {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Most threads of a row.
inline constexpr int row_threads = 512;

/// Rows of `cols` elements held in registers: each of `threads` threads of a row holds `packs` packs of `width`
/// elements; `rows` rows share a block. packs 0: the row is too long for that, or lies askew, and is read again.
struct RowPlan {
  int width = 1, packs = 0, threads = 32, rows = 1;
};
/// `vector`: every row starts on 16 bytes and holds whole packs of 16 bytes. At most `most_packs` (1 to 4) packs a thread.
RowPlan plan_rows(std::int64_t cols, int element_bytes, bool vector, int most_packs = 4);

/// Blocks that walk over the rows: as many as run at once (`threads_at_once` threads a multiprocessor), or fewer.
std::int64_t walking_blocks(std::int64_t multiprocessors, const RowPlan& plan, std::int64_t rows, std::int64_t threads_at_once = 1024);

/// Blocks of a norm's backward, each of which leaves one row of partial sums.
std::int64_t norm_backward_blocks(std::int64_t rows, std::int64_t cols);

/// Scores of wide rows: a cluster of `cluster` blocks takes a row, each block `slice` columns, kept in
/// `cached` elements of shared memory between the two passes.
struct ScorePlan {
  int cluster = 1, threads = 512;
  std::int64_t slice = 0, cached = 0, shared_bytes = 0;
};
ScorePlan plan_scores(std::int64_t cols, int compute_bytes, bool keep);

/// Rows added by id: sorted positions are taken in chunks of `chunk`.
struct ScatterPlan {
  static constexpr std::int64_t chunk = 64;
  std::int64_t chunks = 0;
  std::int64_t keys = 0, order = 0, ids = 0, partial = 0, sort = 0;  ///< byte offsets in the workspace
  std::int64_t workspace = 0;
};
/// sort_bytes: what the sort itself asks for.
ScatterPlan plan_scatter(std::int64_t count, std::int64_t cols, int compute_bytes, std::int64_t sort_bytes);

}  // namespace capstan::kernels::cuda
