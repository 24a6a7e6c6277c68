// Sampling: what each filter keeps, that draws follow the distribution, and that they depend on their address only.
#include "plugins/inference/basic/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

namespace capstan::basic {
namespace {

SamplingParams params(double temperature, std::int64_t top_k = 0, double top_p = 1, double min_p = 0) {
  SamplingParams p;
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  return p;
}

/// Logits whose softmax is `p`.
std::vector<float> logits_of(const std::vector<double>& p) {
  std::vector<float> z;
  for (const double x : p) z.push_back(static_cast<float>(std::log(x)));
  return z;
}

using Ids = std::vector<std::int32_t>;

TEST(Sampler, GreedyTakesTheLargestAndOfEqualOnesTheLowestId) {
  const std::vector<float> z{0.5f, 2, -1, 2, 2};
  for (std::int64_t position = 0; position < 20; ++position) EXPECT_EQ(sample(z, params(0), 3, position), 1);
}

TEST(Sampler, WithoutFiltersProbabilitiesAreTheSoftmax) {
  const std::vector<double> p{0.1, 0.4, 0.2, 0.3};
  const Candidates c = filter(logits_of(p), params(1));
  ASSERT_EQ(c.ids, (Ids{0, 1, 2, 3}));
  for (std::size_t i = 0; i < p.size(); ++i) EXPECT_NEAR(c.probabilities[i], p[i], 1e-7);
}

TEST(Sampler, TemperatureDividesLogits) {
  const std::vector<double> p{0.1, 0.4, 0.2, 0.3};
  const Candidates c = filter(logits_of(p), params(0.5));
  const double sum = 0.01 + 0.16 + 0.04 + 0.09;
  for (std::size_t i = 0; i < p.size(); ++i) EXPECT_NEAR(c.probabilities[i], p[i] * p[i] / sum, 1e-7);
}

TEST(Sampler, TopKKeepsExactlyKAndOfEqualOnesTheLowerIds) {
  EXPECT_EQ(filter(logits_of({0.1, 0.4, 0.2, 0.3}), params(1, 2)).ids, (Ids{1, 3}));
  const std::vector<float> equal(10, 0.25f);
  EXPECT_EQ(filter(equal, params(1, 3)).ids, (Ids{0, 1, 2}));
  EXPECT_EQ(filter(equal, params(1, 50)).ids.size(), 10u);
}

TEST(Sampler, TopPKeepsTheShortestStartThatReachesP) {
  const std::vector<float> z = logits_of({0.1, 0.4, 0.2, 0.3});
  EXPECT_EQ(filter(z, params(1, 0, 0.3)).ids, (Ids{1}));
  EXPECT_EQ(filter(z, params(1, 0, 0.41)).ids, (Ids{1, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 0.69)).ids, (Ids{1, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 0.71)).ids, (Ids{1, 2, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 1e-9)).ids, (Ids{1}));
  const Candidates c = filter(z, params(1, 0, 0.69));
  EXPECT_NEAR(c.probabilities[0], 0.4 / 0.7, 1e-7);
}

TEST(Sampler, MinPIsRelativeToTheLikeliest) {
  const std::vector<float> z = logits_of({0.1, 0.4, 0.2, 0.3});
  EXPECT_EQ(filter(z, params(1, 0, 1, 0.3)).ids, (Ids{1, 2, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 1, 0.6)).ids, (Ids{1, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 1, 1)).ids, (Ids{1}));
}

TEST(Sampler, FiltersApplyInOrder) {
  // After top-k 3 the rest {0.4, 0.3, 0.2} is renormalized to {0.444, 0.333, 0.222}: 0.75 is reached by two.
  // On the whole distribution {0.4, 0.3} sums to 0.7 and 0.75 would take three.
  const std::vector<float> z = logits_of({0.1, 0.4, 0.2, 0.3});
  EXPECT_EQ(filter(z, params(1, 3, 0.75)).ids, (Ids{1, 3}));
  EXPECT_EQ(filter(z, params(1, 0, 0.75)).ids, (Ids{1, 2, 3}));
  // Temperature comes first: at 0.5 the likeliest is 16/30, so 0.5 is reached by one token.
  EXPECT_EQ(filter(z, params(0.5, 0, 0.5)).ids, (Ids{1}));
  EXPECT_EQ(filter(z, params(1, 0, 0.5)).ids, (Ids{1, 3}));
  // min-p sees tempered probabilities: 0.3 / 0.4 at temperature 1, its square at 0.5.
  EXPECT_EQ(filter(z, params(0.5, 0, 1, 0.6)).ids, (Ids{1}));
}

/// Pearson's statistic of `n` draws of one request against `expected`.
double chi_square(std::span<const float> z, const SamplingParams& p, const std::vector<double>& expected, int n) {
  std::vector<double> counts(z.size());
  for (int i = 0; i < n; ++i) ++counts[static_cast<std::size_t>(sample(z, p, 11, i))];
  double sum = 0;
  for (std::size_t i = 0; i < z.size(); ++i) {
    if (expected[i] == 0)
      EXPECT_EQ(counts[i], 0) << "token " << i << " was filtered out";
    else
      sum += (counts[i] - n * expected[i]) * (counts[i] - n * expected[i]) / (n * expected[i]);
  }
  return sum;
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<double> p{0.02, 0.38, 0.2, 0.3, 0.1};
  const std::vector<float> z = logits_of(p);
  // 4 degrees of freedom: 18.5 is exceeded once in a thousand.
  EXPECT_LT(chi_square(z, params(1), p, 20000), 18.5);
  // The test can fail: draws at another temperature are far off.
  EXPECT_GT(chi_square(z, params(0.7), p, 20000), 100);
  const double kept = 0.38 + 0.3 + 0.2;
  EXPECT_LT(chi_square(z, params(1, 3), {0, 0.38 / kept, 0.2 / kept, 0.3 / kept, 0}, 20000), 13.8);
}

TEST(Sampler, DrawsDependOnSeedRequestAndPositionOnly) {
  const std::vector<float> z(50, 0.f);
  SamplingParams p = params(1);
  const auto draws = [&](std::int64_t request) {
    Ids ids;
    for (std::int64_t i = 0; i < 40; ++i) ids.push_back(sample(z, p, request, i));
    return ids;
  };
  const Ids first = draws(1);
  EXPECT_EQ(draws(1), first);
  EXPECT_NE(draws(2), first);
  p.seed = 9;
  EXPECT_NE(draws(1), first);
  EXPECT_GT(std::set<std::int32_t>(first.begin(), first.end()).size(), 15u);
}

TEST(Sampler, ExtremeLogitsStayExact) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(filter(std::vector<float>{-inf, 3e38f, -3e38f}, params(1e-6)).ids, (Ids{1}));
  EXPECT_EQ(filter(std::vector<float>{-inf, 0, 0}, params(1)).ids, (Ids{1, 2}));
  EXPECT_EQ(sample(std::vector<float>{-inf, -5}, params(0), 0, 0), 1);
}

TEST(Sampler, BrokenLogitsAreErrors) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  for (const double temperature : {0.0, 1.0}) {
    EXPECT_THROW(sample(std::vector<float>{0, nan, 1}, params(temperature), 0, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{nan, 0, 1}, params(temperature), 0, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{0, inf, 1}, params(temperature), 0, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{-inf, -inf}, params(temperature), 0, 0), Error);
  }
}

}  // namespace
}  // namespace capstan::basic
