// The kernels' own tests (tests/gpu/kernels) on an emulated GPU: small shapes, everywhere.
#include <gtest/gtest.h>

#include "../../gpu/kernels/harness.h"

#include <cmath>
#include <cstdio>
#include <sstream>
#include <string>

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

// A dry run: that there are rows, not what is in them.
TEST(EmulatedGpu, TheBenchPrintsItsRows) {
  Context ctx;
  testing::internal::CaptureStdout();
  bench_attention(ctx, true);
  const std::string text = testing::internal::GetCapturedStdout();
  std::istringstream lines(text);
  std::string line;
  ASSERT_TRUE(std::getline(lines, line) && line.starts_with("attention bf16, causal")) << text;
  int rows = 0;
  for (; std::getline(lines, line); ++rows) {
    EXPECT_TRUE(line.starts_with("own ")) << line;
    double forward = 0, backward = 0;
    ASSERT_EQ(std::sscanf(line.substr(52).c_str(), "%lf %lf", &forward, &backward), 2) << line;
    EXPECT_TRUE(std::isfinite(forward) && forward > 0) << line;
    EXPECT_TRUE(std::isfinite(backward) && backward > 0) << line;
  }
  EXPECT_EQ(rows, 2);
}

}  // namespace
