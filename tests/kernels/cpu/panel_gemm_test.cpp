// Products from packed panels: right in every corner of the shapes, the same bits for every number of threads and rows.
#include <gtest/gtest.h>
#include <kernels/cpu/backend.h>
#include <kernels/cpu/panel_gemm.h>
#include <support/tolerance.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace capstan::kernels::cpu {
namespace {

std::vector<float> numbers(std::int64_t n, std::uint32_t seed) {
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
  return v;
}

struct Case { bool trans_a, trans_b; std::int64_t m, n, k, wider; };

class PanelGemm : public ::testing::TestWithParam<Case> {};

TEST_P(PanelGemm, IsTheProductForEveryNumberOfThreads) {
  const auto [trans_a, trans_b, m, n, k, wider] = GetParam();
  Gemm g;
  g.trans_a = trans_a, g.trans_b = trans_b, g.m = m, g.n = n, g.k = k;
  g.lda = (trans_a ? m : k) + wider, g.ldb = (trans_b ? k : n) + wider, g.ldc = n + wider;
  if (!has_panel_gemm(g)) return;  // no AVX-512: other paths serve, under their own tests
  const auto a = numbers((trans_a ? k : m) * g.lda, 1), b = numbers((trans_b ? n : k) * g.ldb, 2), bias = numbers(n, 3), before = numbers(m * g.ldc, 4);
  for (const bool accumulate : {false, true}) {
    g.accumulate = accumulate, g.bias = !trans_a;
    std::vector<float> first;
    for (const int threads : {1, 2, 3, 4}) {
      Context context(threads);
      std::vector<float> c = before;
      panel_gemm(context, g, a.data(), b.data(), c.data(), g.bias ? bias.data() : nullptr);
      if (first.empty()) first = c;
      ASSERT_EQ(std::memcmp(first.data(), c.data(), c.size() * sizeof(float)), 0) << threads << " threads";
    }
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < g.ldc; ++j) {
        const auto at = static_cast<std::size_t>(i * g.ldc + j);
        if (j >= n) {
          ASSERT_EQ(first[at], before[at]) << "a column beyond the product was written, row " << i;
          continue;
        }
        if ((i * 31 + j) % 11 != 0 && i + 7 < m && j + 3 < n) continue;  // all edges, a sample of the middle
        double sum = (accumulate ? static_cast<double>(before[at]) : 0.0) + (g.bias ? static_cast<double>(bias[static_cast<std::size_t>(j)]) : 0.0);
        for (std::int64_t p = 0; p < k; ++p)
          sum += static_cast<double>(a[static_cast<std::size_t>(trans_a ? p * g.lda + i : i * g.lda + p)]) *
                 static_cast<double>(b[static_cast<std::size_t>(trans_b ? j * g.ldb + p : p * g.ldb + j)]);
        ASSERT_NEAR(static_cast<double>(first[at]), sum, bounds::product(k)) << "row " << i << ", column " << j;
      }
  }
}

// GELU's slope as C is stored, and the sums of A as it is packed: the bits of the pass after it, and C's own.
TEST_P(PanelGemm, TakesGeluSlopeAndSumsOfA) {
  const auto [trans_a, trans_b, m, n, k, wider] = GetParam();
  Gemm g;
  g.trans_a = trans_a, g.trans_b = trans_b, g.m = m, g.n = n, g.k = k;
  g.lda = (trans_a ? m : k) + wider, g.ldb = (trans_b ? k : n) + wider, g.ldc = n;
  Context context(2);
  CpuBackend cpu(context);
  Backend& backend = cpu;
  if (!backend.takes_gelu_slope(g)) return;  // gradients are the library's here
  const auto a = numbers((trans_a ? k : m) * g.lda, 1), b = numbers((trans_b ? n : k) * g.ldb, 2), at = numbers(m * n, 3), before = numbers(std::max(m, n) * n, 4);
  std::vector<float> product(static_cast<std::size_t>(m * n)), want(product.size()), c(product.size());
  backend.gemm(g, a.data(), b.data(), product.data());
  backend.unary_backward(UnaryOp::gelu, Num::f32, m * n, at.data(), product.data(), want.data());
  g.gelu_slope_of = at.data();
  backend.gemm(g, a.data(), b.data(), c.data());
  EXPECT_EQ(std::memcmp(c.data(), want.data(), c.size() * sizeof(float)), 0);
  EXPECT_THROW(backend.gemm(g, a.data(), b.data(), c.data(), at.data()), std::invalid_argument) << "a bias beside the slope";
  g.gelu_slope_of = nullptr;
  g.sums_of_a = c.data();
  if (!trans_a) {
    EXPECT_THROW(backend.gemm(g, a.data(), b.data(), product.data()), std::invalid_argument);
    return;
  }
  for (const bool accumulate : {false, true}) {
    g.accumulate = accumulate;
    std::vector<float> first;
    for (const int threads : {1, 2, 3, 4}) {
      Context other(threads);
      std::vector<float> sums(before.begin(), before.begin() + m), with(before.begin(), before.begin() + m * n), without = with;
      g.sums_of_a = sums.data();
      panel_gemm(other, g, a.data(), b.data(), with.data(), nullptr);
      g.sums_of_a = nullptr;
      panel_gemm(other, g, a.data(), b.data(), without.data(), nullptr);
      EXPECT_EQ(std::memcmp(with.data(), without.data(), with.size() * sizeof(float)), 0);
      if (first.empty()) first = sums;
      EXPECT_EQ(std::memcmp(first.data(), sums.data(), sums.size() * sizeof(float)), 0) << threads << " threads";
    }
    for (std::int64_t i = 0; i < m; ++i) {
      double sum = accumulate ? static_cast<double>(before[static_cast<std::size_t>(i)]) : 0.0;
      for (std::int64_t p = 0; p < k; ++p) sum += static_cast<double>(a[static_cast<std::size_t>(p * g.lda + i)]);
      ASSERT_NEAR(static_cast<double>(first[static_cast<std::size_t>(i)]), sum, bounds::product(k)) << "column " << i << " of A";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PanelGemm,
                         ::testing::Values(Case{false, true, 1, 1, 1, 0}, Case{false, true, 7, 65, 17, 3}, Case{false, true, 100, 300, 1600, 0},
                                           Case{false, false, 64, 130, 33, 1}, Case{false, false, 29, 64, 800, 0}, Case{true, false, 1, 1, 1, 0},
                                           Case{true, false, 97, 70, 19, 1}, Case{true, false, 300, 450, 1100, 0}, Case{true, false, 192, 64, 515, 5}, Case{true, false, 400, 900, 2100, 0}, Case{false, false, 170, 1600, 1500, 0}));

}  // namespace
}  // namespace capstan::kernels::cpu
