// Invariant products: a row's bits do not depend on how many rows there are, on packing, or on the threads.
#include <gtest/gtest.h>
#include <kernels/cpu/gemm.h>
#include <support/tolerance.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace capstan::kernels::cpu {
namespace {

std::vector<float> numbers(std::int64_t n, std::uint32_t seed) {
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
  return v;
}

struct Shape { std::int64_t k, n; };

class InvariantGemm : public ::testing::TestWithParam<Shape> {};

// 1,100 rows take the packed path, the others the plain one.
TEST_P(InvariantGemm, RowsDoNotDependOnTheirCountOrTheThreads) {
  const auto [k, n] = GetParam();
  constexpr std::int64_t most = 1100;
  const auto a = numbers(most * k, 1), b = numbers(n * k, 2), bias = numbers(n, 3), before = numbers(most * n, 4);
  for (const bool accumulate : {false, true}) {
    Gemm g;
    g.trans_b = g.bias = g.invariant = true, g.accumulate = accumulate;
    g.n = n, g.k = k, g.lda = k, g.ldb = k, g.ldc = n, g.m = most;
    Context context(2);
    std::vector<float> whole = before;
    gemm(context, g, a.data(), b.data(), whole.data(), bias.data());
    for (const std::int64_t m : {1, 3, 16, 64, 1023, 1024}) {
      for (const int threads : {1, 3}) {
        Context other(threads);
        std::vector<float> part = before;
        g.m = m;
        gemm(other, g, a.data(), b.data(), part.data(), bias.data());
        EXPECT_EQ(std::memcmp(part.data(), whole.data(), static_cast<std::size_t>(m * n) * sizeof(float)), 0)
            << m << " rows, " << threads << " threads, accumulate " << accumulate;
      }
    }
    // And the numbers are right: one row against f64.
    for (std::int64_t j = 0; j < n; j += 37) {
      double sum = static_cast<double>(bias[static_cast<std::size_t>(j)]) + (accumulate ? static_cast<double>(before[static_cast<std::size_t>(7 * n + j)]) : 0.0);
      for (std::int64_t p = 0; p < k; ++p) sum += static_cast<double>(a[static_cast<std::size_t>(7 * k + p)]) * static_cast<double>(b[static_cast<std::size_t>(j * k + p)]);
      EXPECT_NEAR(static_cast<double>(whole[static_cast<std::size_t>(7 * n + j)]), sum, bounds::product(k));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, InvariantGemm, ::testing::Values(Shape{768, 192}, Shape{3072, 64}, Shape{100, 257}));

TEST(Gemm, RefusesPaddedRowsInAnInvariantProduct) {
  Context context(1);
  const auto a = numbers(4 * 40, 1), b = numbers(8 * 32, 2);
  std::vector<float> c(4 * 8);
  Gemm g;
  g.trans_b = g.invariant = true;
  g.m = 4, g.n = 8, g.k = 32, g.lda = 40, g.ldb = 32, g.ldc = 8;
  EXPECT_THROW(gemm(context, g, a.data(), b.data(), c.data()), std::runtime_error);
}

}  // namespace
}  // namespace capstan::kernels::cpu
