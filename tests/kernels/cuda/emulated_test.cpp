// The kernels' own tests (tests/gpu/kernels) on an emulated GPU: small shapes, everywhere.
#include <gtest/gtest.h>

#include "../../gpu/kernels/harness.h"

namespace {

using namespace gpu_test;

void run(void (*test)(Context&, bool)) {
  Context ctx;
  failures = passes = 0;
  test(ctx, true);
  EXPECT_EQ(failures, 0);
  EXPECT_GT(passes, 50);
}

TEST(EmulatedGpu, NormsSoftmaxAndRowsById) { run(test_rows); }
TEST(EmulatedGpu, Scores) { run(test_scores); }
TEST(EmulatedGpu, Attention) { run(test_attention); }
TEST(EmulatedGpu, QuantizersToFp8) { run(test_fp8); }

}  // namespace
