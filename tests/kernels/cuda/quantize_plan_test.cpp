// Launch plans of the quantizers: everything is covered once, whatever the shape.
#include <gtest/gtest.h>
#include <kernels/cuda/quantize_plan.h>

#include <vector>

namespace capstan::kernels::cuda {
namespace {

const void* at(std::uintptr_t address) { return reinterpret_cast<const void*>(address); }

TEST(QuantizePlan, TilesCoverTheMatrix) {
  for (const std::int64_t rows : {1, 63, 64, 65, 1000, 1 << 20})
    for (const std::int64_t cols : {16, 48, 64, 80, 4096}) {
      const QuantizePlan p = quantize_plan(rows, cols, cols, 2, at(256));
      EXPECT_GE(p.tile_cols * QuantizeTile::cols, cols);
      EXPECT_LT((p.tile_cols - 1) * QuantizeTile::cols, cols);
      EXPECT_EQ(p.tiles % p.tile_cols, 0);
      EXPECT_GE(p.tiles / p.tile_cols * QuantizeTile::rows, rows);
      EXPECT_LT((p.tiles / p.tile_cols - 1) * QuantizeTile::rows, rows);
      EXPECT_TRUE(p.vector);
    }
  EXPECT_FALSE(quantize_plan(8, 64, 64, 2, at(258)).vector);  // an address off 16 bytes
  EXPECT_FALSE(quantize_plan(8, 64, 67, 2, at(256)).vector);  // rows that begin off 16 bytes
  EXPECT_TRUE(quantize_plan(8, 64, 72, 2, at(256)).vector);
  EXPECT_THROW(quantize_plan(std::int64_t{1} << 40, 64, 64, 2, at(256)), std::invalid_argument);
}

TEST(AmaxPlan, ReadsEveryNumberOnce) {
  for (const std::int64_t element : {2, 4})
    for (const std::int64_t rows : {1, 3, 64, 1000})
      for (const std::int64_t cols : {16, 48, 4096})
        for (const std::int64_t more : {0, 3, 16}) {
          const AmaxPlan p = amax_plan(rows, cols, cols + more, element, at(more == 3 ? 2 : 256));
          EXPECT_EQ(p.packs * p.width, rows * cols);
          EXPECT_TRUE(p.width == 1 || p.width == 16 / element);
          EXPECT_EQ(cols % p.width, 0);
          EXPECT_EQ((cols + more) % p.width, 0);  // packs never straddle rows
          EXPECT_EQ(p.per_row, more != 0 ? cols / p.width : p.packs);
          EXPECT_GE(p.blocks, 1);
          EXPECT_LE(p.blocks, 2048);
        }
  EXPECT_EQ(amax_plan(65536, 768, 768, 2, at(256)).width, 8);
  EXPECT_GE(amax_plan(65536, 768, 768, 2, at(256)).blocks, 1024);
}

}  // namespace
}  // namespace capstan::kernels::cuda
