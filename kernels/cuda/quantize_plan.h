// defines: how the quantizers to fp8 are laid out on a GPU. Plain host code that depends on shapes and addresses alone,
// tested without a GPU.
#pragma once
#include <kernels/cuda/plan.h>

#include <stdexcept>
#include <string>

namespace capstan::kernels::cuda {

/// Blocks of `threads` threads over tiles of `rows` x `cols` numbers; a thread takes `run` neighbours of a row, then of a
/// column.
struct QuantizeTile {
  static constexpr int threads = 256, rows = 64, cols = 64, run = 16;
};
static_assert(QuantizeTile::threads * QuantizeTile::run == QuantizeTile::rows * QuantizeTile::cols);

/// Tiles in row order, one block each. `vector`: rows can be read 16 bytes at a time.
struct QuantizePlan {
  std::int64_t tile_cols = 0, tiles = 0;
  bool vector = false;
};

inline QuantizePlan quantize_plan(std::int64_t rows, std::int64_t cols, std::int64_t stride, std::int64_t element,
                                  const void* x) {
  QuantizePlan p;
  p.tile_cols = blocks_for(cols, QuantizeTile::cols);
  p.tiles = p.tile_cols * blocks_for(rows, QuantizeTile::rows);
  p.vector = vector_width(element, {x}) > 1 && stride * element % 16 == 0;
  if (p.tiles > most_blocks_x)
    throw std::invalid_argument("[quantize] a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
                                " has more tiles than a grid has blocks");
  return p;
}

/// The largest magnitude of a matrix: packs of `width` numbers, `per_row` in each row, dealt out to the threads of all
/// blocks in turn. Rows that lie close together are one.
struct AmaxPlan {
  std::int64_t packs = 0, per_row = 0, blocks = 0;
  int width = 1;
};

inline constexpr int amax_threads = 256;

inline AmaxPlan amax_plan(std::int64_t rows, std::int64_t cols, std::int64_t stride, std::int64_t element, const void* x) {
  AmaxPlan p;
  const int width = vector_width(element, {x});
  if (width > 1 && cols % width == 0 && stride % width == 0) p.width = width;
  p.packs = rows * cols / p.width;
  p.per_row = stride == cols ? p.packs : cols / p.width;
  p.blocks = std::clamp<std::int64_t>(blocks_for(p.packs, std::int64_t{amax_threads} * 4), 1, 2048);
  return p;
}

}  // namespace capstan::kernels::cuda
