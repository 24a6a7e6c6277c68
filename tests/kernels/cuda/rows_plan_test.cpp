// Launch plans of row kernels over odd shapes: everything is covered, limits hold, idle lanes are few.
#include <gtest/gtest.h>
#include <kernels/cuda/rows_plan.h>

namespace capstan::kernels::cuda {
namespace {

TEST(RowPlan, CoversEveryRowWithinItsLimits) {
  for (const int bytes : {2, 4})
    for (const int most : {1, 2, 3, 4})
      for (std::int64_t packs = 1; packs < 4000; packs = packs * 9 / 8 + 1) {
        const std::int64_t cols = packs * (16 / bytes);
        const RowPlan p = plan_rows(cols, bytes, true, most);
        SCOPED_TRACE(testing::Message() << cols << " columns of " << bytes << " bytes, " << most << " packs");
        EXPECT_EQ(p.width, 16 / bytes);
        EXPECT_LE(p.packs, most);
        EXPECT_LE(p.threads, row_threads);
        EXPECT_LE(p.threads * p.rows, std::max(row_threads, 128));
        EXPECT_TRUE(p.threads % 32 == 0 || p.threads == 8 || p.threads == 16);  // reductions run within a warp or over whole ones
        EXPECT_EQ(p.threads * p.rows % 32, 0);
        if (packs <= static_cast<std::int64_t>(row_threads) * most) {
          ASSERT_GT(p.packs, 0);
          EXPECT_GE(static_cast<std::int64_t>(p.threads) * p.packs, packs);
          if (packs >= 64) {
            EXPECT_GE(static_cast<double>(packs) / (p.threads * p.packs), most == 1 ? 0.5 : 0.65);
          }
        } else {
          EXPECT_EQ(p.packs, 0);
        }
      }
}

TEST(RowPlan, RowsAskewAreReadElementByElement) {
  for (const std::int64_t cols : {1, 7, 100, 5001, 40000}) {
    const RowPlan p = plan_rows(cols, 2, false);
    EXPECT_EQ(p.width, 1);
    EXPECT_EQ(p.packs, 0);
    EXPECT_GE(p.threads, 32);
  }
}

TEST(NormBackwardBlocks, DependOnTheShapeAloneAndAreNeverMoreThanTheRows) {
  for (const std::int64_t cols : {1, 128, 768, 1600, 4096, 8192, 16384, 100000})
    for (const std::int64_t rows : {1, 2, 16, 17, 1000, 65536, 1 << 20}) {
      const std::int64_t blocks = norm_backward_blocks(rows, cols);
      EXPECT_GE(blocks, 1);
      EXPECT_LE(blocks, rows);
      EXPECT_LE(blocks * cols * 4, 64 << 20) << rows << " x " << cols;  // bytes of partial sums
    }
}

TEST(WalkingBlocks, AreAsManyAsRunAtOnceOrAsThereIsWorkFor) {
  for (std::int64_t cols = 1; cols < 70'000; cols = cols * 5 / 4 + 1)
    for (const std::int64_t rows : {1, 2, 100, 131, 132, 5000, 1 << 20})
      for (const std::int64_t at_once : {1024, 4096}) {
        const RowPlan plan = plan_rows(cols, 2, cols % 8 == 0);
        const std::int64_t blocks = walking_blocks(132, plan, rows, at_once);
        EXPECT_GE(blocks, 1);
        EXPECT_LE((blocks - 1) * plan.rows, rows - 1) << "each has a row";
        EXPECT_LE(blocks * plan.rows * plan.threads, 132 * std::max<std::int64_t>(at_once, plan.rows * plan.threads));
        if (blocks * plan.rows < rows) {
          EXPECT_GT((blocks + 132) * plan.rows * plan.threads, 132 * at_once) << "one more each would not run at once";
        }
      }
}

TEST(ScorePlan, ClustersCoverTheRowAndBlocksFit) {
  for (std::int64_t cols = 1; cols < 2'000'000; cols = cols * 5 / 4 + 1)
    for (const int bytes : {4, 8}) {
      const ScorePlan one = plan_scores(cols, bytes, false), kept = plan_scores(cols, bytes, true);
      EXPECT_EQ(one.cluster, 1);
      EXPECT_EQ(one.slice, cols);
      EXPECT_EQ(one.shared_bytes, 0);
      EXPECT_TRUE(kept.cluster == 1 || kept.cluster == 2 || kept.cluster == 4 || kept.cluster == 8);
      EXPECT_GE(kept.slice * kept.cluster, cols);
      EXPECT_EQ(kept.slice % 8, 0);
      EXPECT_LE(kept.cached, kept.slice);
      EXPECT_LE(kept.shared_bytes, 208 * 1024);
      if (cols * bytes <= 8 * 208 * 1024) {
        EXPECT_EQ(kept.cached, kept.slice) << cols;
      }  // read once
    }
}

TEST(ScatterPlan, PartsLieApart) {
  for (const std::int64_t count : {1, 63, 64, 65, 5000, 65536})
    for (const std::int64_t cols : {1, 33, 4096}) {
      const ScatterPlan p = plan_scatter(count, cols, 4, 12345);
      EXPECT_EQ(p.chunks, (count + 63) / 64);
      EXPECT_EQ(p.keys, 0);
      EXPECT_GE(p.ids, p.keys + count * 4);
      EXPECT_GE(p.order, p.ids + count * 4);
      EXPECT_GE(p.partial, p.order + count * 8);
      EXPECT_GE(p.sort, p.partial + p.chunks * 2 * cols * 4);
      EXPECT_GE(p.workspace, p.sort + 12345);
      for (const std::int64_t at : {p.ids, p.order, p.partial, p.sort}) EXPECT_EQ(at % 256, 0);
    }
}

}  // namespace
}  // namespace capstan::kernels::cuda
