// Vectors: loads and stores touch what they say, sums keep their order, element functions keep their bounds.
#include <kernels/cpu/dropout.h>
#include <kernels/cpu/simd.h>

#include <capstan/kernels/philox.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace capstan::kernels::cpu {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Worst error of f against the f64 function over [low, high), in units of the last place of the result.
double worst_ulp(const std::function<Vec<float>(Vec<float>)>& f, double (*exact)(double), float low, float high) {
  double worst = 0;
  constexpr int points = 200000;
  for (int k = 0; k < points; k += 16) {
    float x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = low + (high - low) * static_cast<float>(k + i) / points;
    f(Vec<float>::load(x)).store(y);
    for (int i = 0; i < 16; ++i) {
      const double want = exact(x[i]);
      const double unit = std::ldexp(1.0, std::max(-149, want == 0 ? -149 : std::ilogb(want) - 23));
      const double error = std::abs(y[i] - want) / unit;
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

double exact_sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

TEST(Simd, ElementFunctionsAreWithinTheirBounds) {
  const auto e = [](Vec<float> v) { return exp(v); };
  const auto f = [](Vec<float> v) { return exp_flushed(v); };
  const auto l = [](Vec<float> v) { return log(v); };
  const auto t = [](Vec<float> v) { return tanh(v); };
  const auto s = [](Vec<float> v) { return sigmoid(v); };
  EXPECT_LE(worst_ulp(e, std::exp, -1, 1), 1);
  EXPECT_LE(worst_ulp(e, std::exp, -87, 88), 1);
  EXPECT_LE(worst_ulp(e, std::exp, -104, -86), 1);  // denormal results
  EXPECT_LE(worst_ulp(f, std::exp, -1, 1), 1);
  EXPECT_LE(worst_ulp(f, std::exp, -87, 88.5f), 1);
  EXPECT_LE(worst_ulp(l, std::log, 0.001f, 3), 1);
  EXPECT_LE(worst_ulp(l, std::log, 0.9f, 1.1f), 1);
  EXPECT_LE(worst_ulp(l, std::log, 1, 1e30f), 1);
  EXPECT_LE(worst_ulp(l, std::log, 1e-44f, 1e-37f), 1);  // denormal arguments
  EXPECT_LE(worst_ulp(t, std::tanh, -1, 1), 2);
  EXPECT_LE(worst_ulp(t, std::tanh, -12, 12), 2);
  EXPECT_LE(worst_ulp(s, exact_sigmoid, -5, 5), 2.5);
  EXPECT_LE(worst_ulp(s, exact_sigmoid, -87, 20), 2.5);
}

TEST(Simd, ElementFunctionsHoldTheirLimits) {
  const auto at = [](Vec<float> (*f)(Vec<float>), float x) { return f(Vec<float>(x))[5]; };
  EXPECT_EQ(at(exp, -inf), 0); EXPECT_EQ(at(exp, inf), inf); EXPECT_EQ(at(exp, 0), 1); EXPECT_TRUE(std::isnan(at(exp, nan)));
  EXPECT_EQ(at(exp, 88.73f), inf); EXPECT_EQ(at(exp, -104), 0); EXPECT_EQ(at(exp, -1e38f), 0);
  EXPECT_EQ(at(exp_flushed, -inf), 0); EXPECT_EQ(at(exp_flushed, -87.01f), 0); EXPECT_EQ(at(exp_flushed, 0), 1); EXPECT_TRUE(std::isnan(at(exp_flushed, nan)));
  EXPECT_EQ(at(exp_flushed, inf), at(exp_flushed, 88.5f)); EXPECT_LT(at(exp_flushed, inf), inf);
  EXPECT_EQ(at(log, 0), -inf); EXPECT_EQ(at(log, -0.f), -inf); EXPECT_EQ(at(log, inf), inf); EXPECT_EQ(at(log, 1), 0);
  EXPECT_TRUE(std::isnan(at(log, -1))); EXPECT_TRUE(std::isnan(at(log, nan))); EXPECT_TRUE(std::isnan(at(log, -inf)));
  EXPECT_EQ(at(tanh, inf), 1); EXPECT_EQ(at(tanh, -inf), -1); EXPECT_TRUE(std::signbit(at(tanh, -0.f))); EXPECT_TRUE(std::isnan(at(tanh, nan)));
  EXPECT_EQ(at(tanh, 1e-44f), 1e-44f);
  EXPECT_EQ(at(sigmoid, inf), 1); EXPECT_EQ(at(sigmoid, -inf), 0); EXPECT_EQ(at(sigmoid, 0), 0.5f); EXPECT_TRUE(std::isnan(at(sigmoid, nan)));
}

template <class V, class T>
void tails() {
  for (int n = 0; n <= V::lanes; ++n) {
    std::vector<T> from(static_cast<std::size_t>(n)), to(40, T(-7.f));  // a read past `from` is a heap overrun
    for (int i = 0; i < n; ++i) from[static_cast<std::size_t>(i)] = T(static_cast<float>(i + 1));
    const V v = V::load_partial(from.data(), n, 3);
    v.store_partial(to.data() + 4, n);
    for (int i = 0; i < V::lanes; ++i) EXPECT_EQ(v[i], i < n ? i + 1 : 3);
    for (int i = 0; i < 40; ++i)
      EXPECT_EQ(static_cast<float>(to[static_cast<std::size_t>(i)]), i >= 4 && i < 4 + n ? static_cast<float>(i - 3) : -7.f) << n << " at " << i;
  }
}
TEST(Simd, TailsTouchNothingElse) {
  tails<Vec<float>, float>();
  tails<Vec<float>, bf16>();
  tails<Vec<double>, double>();
}

TEST(Simd, Bf16RoundsAsTheScalarType) {
  std::vector<float> x = {0, -0.f, inf, -inf, nan, 1e-45f, -1e-40f, 3.4e38f, 1.00390625f, 1.01171875f, 1.0039063f, 65535.f, -2.5f};
  while (x.size() < 4096) {
    const std::uint32_t u = philox_u32(1, 2, x.size());
    float f;
    std::memcpy(&f, &u, 4);
    x.push_back(f);
  }
  for (std::size_t i = 0; i + 16 <= x.size(); i += 16) {
    bf16 y[16];
    Vec<float>::load(x.data() + i).store(y);
    for (std::size_t k = 0; k < 16; ++k) EXPECT_EQ(y[k].bits, bf16(x[i + k]).bits) << x[i + k];
    float back[16];
    Vec<float>::load(y).store(back);
    for (std::size_t k = 0; k < 16; ++k) EXPECT_EQ(std::memcmp(&back[k], std::vector<float>{y[k]}.data(), 4), 0);
  }
}

TEST(Simd, ReductionsKeepTheirTree) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = std::ldexp(1.f + 0.001f * static_cast<float>(i), i % 5 * 7 - 14);
  float tree[16];
  std::memcpy(tree, x, sizeof tree);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) tree[i] = tree[i] + tree[i + width];
  EXPECT_EQ(reduce_add(Vec<float>::load(x)), tree[0]);
  EXPECT_EQ(reduce_max(Vec<float>::load(x)), *std::max_element(x, x + 16));
  EXPECT_EQ(reduce_min(Vec<float>::load(x)), *std::min_element(x, x + 16));
  double d[8] = {1, 1e-17, 3, -1, 5, 1e16, 2, -1e16};
  EXPECT_EQ(reduce_add(Vec<double>::load(d)), ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7])));
}

// The same row at any alignment gives the same sum.
TEST(Simd, SumsDoNotDependOnAlignment) {
  for (std::int64_t n : {1, 15, 16, 17, 63, 64, 65, 200, 1000}) {
    std::vector<float> row(static_cast<std::size_t>(n) + 40);
    float first = 0;
    for (std::size_t shift = 0; shift < 17; ++shift) {
      for (std::int64_t i = 0; i < n; ++i) row[shift + static_cast<std::size_t>(i)] = static_cast<float>(philox_uniform(3, 1, static_cast<std::uint64_t>(i)));
      const float sum = sum_blocks<float>(n, [p = row.data() + shift](std::int64_t i, auto m) { return Vec<float>::load(p + i, m); });
      if (shift == 0) first = sum;
      EXPECT_EQ(sum, first);
    }
  }
}

TEST(Simd, SelectsByLane) {
  const Vec<float> a = Vec<float>::load(std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, nan}.data()), b(7.f);
  const Vec<float> low = min(a, b), high = max(a, b), picked = select((a > b) | (a == Vec<float>(0.f)), a, -b);
  for (int i = 0; i < 15; ++i) {
    EXPECT_EQ(low[i], std::min(a[i], 7.f)); EXPECT_EQ(high[i], std::max(a[i], 7.f));
    EXPECT_EQ(picked[i], a[i] > 7 || a[i] == 0 ? a[i] : -7.f);
  }
  EXPECT_EQ(low[15], 7); EXPECT_EQ(max(b, a)[15] != max(b, a)[15], true);  // the second operand where one is NaN
}

TEST(Philox32, EqualsTheScalarGenerator) {
  for (std::uint64_t block : {0ull, 5ull, 0xfffffffcull, 0x3fffffffffffff0ull}) {
    std::uint32_t got[32];
    philox_32(0x123456789abcdef0ull, 77, block, got);
    for (std::uint64_t i = 0; i < 32; ++i) EXPECT_EQ(got[i], philox_u32(0x123456789abcdef0ull, 77, 4 * block + i));
  }
}

}  // namespace
}  // namespace capstan::kernels::cpu
