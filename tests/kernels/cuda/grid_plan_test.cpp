// Grids that have more than one dimension or a rule of their own: every place is some block's, and none has more than a GPU allows.
#include <kernels/cuda/attention.h>
#include <kernels/cuda/grid_plan.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::kernels::cuda {
namespace {

constexpr std::int64_t border = std::int64_t{1} << 31;
const std::vector<std::int64_t> sizes{1, 7, 8, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 50257, (1 << 22) - 1, (1 << 22) + 1, border - 1, border, border + 1};

Strided turned(std::int64_t batch, std::int64_t rows, std::int64_t cols) {
  Strided s;
  s.rank = 3, s.shape[0] = batch, s.shape[1] = rows, s.shape[2] = cols;
  s.to[0] = s.from[0] = rows * cols, s.to[1] = cols, s.to[2] = 1, s.from[1] = 1, s.from[2] = rows;
  return s;
}

TEST(GridPlan, TransposingCopiesCoverTheMatrixOrAreLeftToTheWalk) {
  for (const std::int64_t batch : {1, 3, 65535, 65536})
    for (const std::int64_t rows : sizes)
      for (const std::int64_t cols : sizes) {
        const Blocks b = transpose_blocks(turned(batch, rows, cols));
        const bool possible = rows >= 8 && cols >= 8 && batch <= 65535 && rows <= 65535 * 32;
        ASSERT_EQ(b.x > 0, possible) << batch << " " << rows << " " << cols;
        if (!possible) continue;
        EXPECT_TRUE(b.fit());
        EXPECT_EQ(b.z, batch);
        EXPECT_GE(b.x * 32, cols);
        EXPECT_LT((b.x - 1) * 32, cols);
        EXPECT_GE(b.y * 32, rows);
        EXPECT_LT((b.y - 1) * 32, rows);
      }
  Strided straight = turned(1, 64, 64);
  straight.from[1] = 64, straight.from[2] = 1;
  EXPECT_EQ(transpose_blocks(straight).x, 0);
  Strided flat = turned(1, 64, 64);
  flat.rank = 1;
  EXPECT_EQ(transpose_blocks(flat).x, 0);
}

TEST(GridPlan, SumsFitWhateverTheShape) {
  for (const std::int64_t outer : sizes)
    for (const std::int64_t n : {std::int64_t{1}, std::int64_t{1000}, std::int64_t{1025}, border})
      for (const std::int64_t inner : sizes) {
        const ReducePlan plan = reduce_plan(outer, n, inner);
        const Blocks b = column_blocks(outer * plan.chunks, inner);
        EXPECT_EQ(b.x, outer * plan.chunks);
        EXPECT_EQ(b.fit(), outer <= most_blocks_x) << outer << " " << n << " " << inner;
        if (inner <= 65535 * 64) {
          EXPECT_GE(b.y * 64, inner);
          EXPECT_LT((b.y - 1) * 64, inner);
        } else {
          EXPECT_EQ(b.y, 65535) << "the rest is walked";
        }
      }
  for (const std::int64_t outer : sizes)
    for (const std::int64_t n : {1, 1024, 1025}) {
      ASSERT_EQ(rows_are_short(outer, n), n <= 1024 && outer >= 8);
      if (!rows_are_short(outer, n)) continue;
      EXPECT_TRUE(short_row_blocks(outer).fit());
      EXPECT_GE(short_row_blocks(outer).x * 8, outer);
      EXPECT_LT((short_row_blocks(outer).x - 1) * 8, outer);
    }
  for (const std::int64_t n : sizes) EXPECT_EQ(fingerprint_blocks(n).x, std::min<std::int64_t>(64, (n + 255) / 256));
}

TEST(GridPlan, RowsByIdAndScoresCoverEachRow) {
  for (const std::int64_t packs : {1, 31, 32, 33, 128, 129, 6283, 50257}) {
    const unsigned threads = scatter_threads(packs);
    EXPECT_EQ(threads % 32, 0u);
    EXPECT_LE(threads, 128u);
    const Blocks b = scatter_blocks(border / 64, packs);
    EXPECT_TRUE(b.fit());
    EXPECT_GE(b.y * threads, packs);
    EXPECT_LT((b.y - 1) * threads, packs);
  }
  for (const std::int64_t words : sizes) {
    const GatherBlock b = gather_block(words);
    EXPECT_EQ(b.threads * b.rows, 256u);
    EXPECT_TRUE(b.threads == 32 || b.threads < words);
  }
  for (const std::int64_t rows : sizes)
    for (const std::int64_t packs : {1, 2047, 4096, 6283, 50257, 1 << 20}) {
      const Blocks b = score_backward_blocks(rows, packs);
      EXPECT_EQ(b.fit(), rows < border);
      EXPECT_GE(b.y, 1);
      EXPECT_LE(b.y, 16);
      EXPECT_LE(b.y, std::max<std::int64_t>(1, packs / 2048));
    }
  EXPECT_TRUE(score_blocks((border - 1) / 8, 8).fit());
  EXPECT_FALSE(score_blocks(border / 8, 8).fit());
}

TEST(GridPlan, WhatNoGridTakesIsRefusedByName) {
  EXPECT_EQ(checked("a kernel", {border - 1, 65535, 65535}).x, border - 1);
  for (const Blocks& b : {Blocks{border, 1, 1}, Blocks{1, 65536, 1}, Blocks{1, 1, 65536}}) {
    std::string text;
    try {
      checked("a kernel", b);
    } catch (const std::invalid_argument& e) {
      text = e.what();
    }
    EXPECT_NE(text.find("[cuda] a kernel: "), std::string::npos) << text;
    EXPECT_NE(text.find("data.micro_batch"), std::string::npos) << text;
  }
}

TEST(GridPlan, RunningSumsHaveABlockOrAThreadForEveryColumn) {
  for (const std::int64_t outer : {std::int64_t{1}, std::int64_t{3}, std::int64_t{20000}, border - 1, border})
    for (const std::int64_t n : {1, 64, 65, 100000})
      for (const std::int64_t inner : {1, 8, 20000}) {
        if (outer * inner > std::int64_t{1} << 40) continue;
        const ScanPlan plan = plan_scan(outer, n, inner);
        const std::int64_t each = plan.by_block ? 1 : scan_threads;
        EXPECT_GE(plan.blocks.x * each, outer * inner);
        EXPECT_LT((plan.blocks.x - 1) * each, outer * inner);
        EXPECT_EQ(plan.by_block, n > 64 && (inner == 1 || outer * inner < 16384)) << outer << " " << n << " " << inner;
      }
}

// Their tiles are a grid's second dimension: said before anything is launched, not by CUDA as an invalid argument.
TEST(GridPlan, AttentionsOwnKernelsRefuseMoreTilesThanAGridHas) {
  Context ctx;
  ctx.attention_choice.cudnn = false;
  for (const Num num : {Num::bf16, Num::f32, Num::f64}) {
    const std::vector<std::int32_t> starts{0, 65536 * 128};
    Attention a;
    a.num = num, a.heads = a.kv_heads = 1, a.head_size = 64, a.q_stride = a.k_stride = a.v_stride = a.out_stride = 64;
    a.host_starts = starts.data(), a.sequences = 1, a.rows = starts.back(), a.longest = a.rows;
    EXPECT_THROW(attention(ctx, a), std::invalid_argument) << static_cast<int>(num);
    // One row whose keys are more: the queries' tiles fit, the keys' do not.
    const std::vector<std::int32_t> one{0, 1}, first{0}, keys{65536 * 64};
    float row[64] = {};
    a.host_starts = one.data(), a.rows = a.longest = 1, a.host_key_begins = first.data(), a.host_key_counts = keys.data();
    a.out = a.dq = row, a.dout = row, a.q = a.k = a.v = row, a.lse = row, a.dout_stride = a.dq_stride = a.dkv_stride = 64;
    if (num == Num::f32) {
      EXPECT_THROW(attention_backward(ctx, a), std::invalid_argument);
    }
  }
}

}  // namespace
}  // namespace capstan::kernels::cuda
