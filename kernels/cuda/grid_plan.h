// defines: the grids of kernels that lay their blocks out in more than one dimension, or by a rule of their own. Plain host code
// that depends on shapes alone, tested without a GPU.
#pragma once
#include <kernels/cuda/plan.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace capstan::kernels::cuda {

struct Blocks {
  std::int64_t x = 1, y = 1, z = 1;
  bool fit() const { return x <= most_blocks_x && y <= most_blocks_yz && z <= most_blocks_yz; }
};

/// `blocks`, of a kernel that has no other way to take more. Throws std::invalid_argument when no grid has so many.
inline Blocks checked(const char* kernel, const Blocks& blocks) {
  if (blocks.fit()) return blocks;
  throw std::invalid_argument(std::string("[cuda] ") + kernel + ": " + std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " x " + std::to_string(blocks.z) +
                              " blocks: a grid has at most " + std::to_string(most_blocks_x) + " x " + std::to_string(most_blocks_yz) + " x " + std::to_string(most_blocks_yz) +
                              "; fewer rows at once (data.micro_batch) lower it");
}

/// A copy that turns the last two dimensions over in tiles of 32 x 32: columns, rows, batch. x 0: the copy is none, or has more than
/// a grid: elements are then walked one by one.
inline constexpr std::int64_t transpose_tile = 32;
inline Blocks transpose_blocks(const Strided& s) {
  const Blocks none{0, 0, 0};
  if (s.rank != 2 && s.rank != 3) return none;
  const int r = s.rank - 2, c = s.rank - 1;
  if (s.to[c] != 1 || s.from[r] != 1 || s.shape[r] < 8 || s.shape[c] < 8) return none;
  const Blocks b{blocks_for(s.shape[c], transpose_tile), blocks_for(s.shape[r], transpose_tile), s.rank == 3 ? s.shape[0] : 1};
  return b.fit() ? b : none;
}

/// Sums of columns: a block for each of `rows` (outer, or outer times chunks) and 64 columns; further columns are walked.
inline Blocks column_blocks(std::int64_t rows, std::int64_t inner) { return {rows, std::min(blocks_for(inner, 64), most_blocks_yz), 1}; }

/// Rows so short, and so many, that a warp sums each: 8 a block.
inline bool rows_are_short(std::int64_t outer, std::int64_t n) { return n <= 1024 && outer >= 8; }
inline Blocks short_row_blocks(std::int64_t outer) { return {blocks_for(outer, 8), 1, 1}; }

/// Few: the host adds what their threads leave.
inline Blocks fingerprint_blocks(std::int64_t n) { return {std::min<std::int64_t>(blocks_for(n, 256), 64), 1, 1}; }

/// Scores: a cluster of blocks for each row; their gradients: a block for some 2048 packs of a row, at most 16.
inline Blocks score_blocks(std::int64_t rows, std::int64_t cluster) { return {rows * cluster, 1, 1}; }
inline Blocks score_backward_blocks(std::int64_t rows, std::int64_t packs) { return {rows, std::clamp<std::int64_t>(packs / 2048, 1, 16), 1}; }

/// Gathered rows: `threads` of a row's words, as many rows as fill 256.
struct GatherBlock { unsigned threads = 32, rows = 8; };
inline GatherBlock gather_block(std::int64_t words) {
  GatherBlock b;
  while (b.threads < 256 && b.threads * 2 < words) b.threads *= 2;
  b.rows = 256 / b.threads;
  return b;
}

/// Scattered rows: a block for each chunk of sorted positions and `scatter_threads` packs of a row.
inline unsigned scatter_threads(std::int64_t packs) { return static_cast<unsigned>(std::clamp<std::int64_t>(blocks_for(packs, 32) * 32, 32, 128)); }
inline Blocks scatter_blocks(std::int64_t chunks, std::int64_t packs) { return {chunks, blocks_for(packs, scatter_threads(packs)), 1}; }

/// Running sums along n of [outer, n, inner]: a block for each column, which takes scan_threads * scan_items elements at a time,
/// where columns are long and there are too few of them for a thread each (or they are rows: neighbours in memory); else a
/// thread for each.
inline constexpr int scan_threads = 256, scan_items = 4;
struct ScanPlan {
  bool by_block = false;
  Blocks blocks;
};
inline ScanPlan plan_scan(std::int64_t outer, std::int64_t n, std::int64_t inner) {
  const std::int64_t columns = outer * inner;
  if (n > 64 && (inner == 1 || columns < 16384)) return {true, {columns, 1, 1}};
  return {false, {blocks_for(columns, scan_threads), 1, 1}};
}

/// Attention's own kernels: heads, and tiles of rows.
inline Blocks attention_blocks(std::int64_t heads, std::int64_t tiles) { return {heads, tiles, 1}; }

}  // namespace capstan::kernels::cuda
