// linear_cross_entropy: against log_softmax of all logits; the objective's gradient made in the forward
// against the gradient of the scores; targets of -1; chunks of rows.
#include "core/ops/harness.h"

#include <gmock/gmock.h>

#include <cmath>

namespace capstan::testing {
namespace {

using Ins = std::span<const Tensor>;
using ::testing::HasSubstr;

std::vector<std::int32_t> targets_of(std::int64_t rows, std::int64_t vocabulary) {
  std::vector<std::int32_t> y;
  for (std::int64_t t = 0; t < rows; ++t) y.push_back(t % 5 == 3 ? -1 : static_cast<std::int32_t>((t * 7 + 1) % vocabulary));
  return y;
}

Tensor joined(const Tensor& logprob, const Tensor& lse, const Tensor& entropy) {
  const auto column = [](const Tensor& t) { return ops::reshape(t, Dims{t.numel(), 1}); };
  const Tensor parts[] = {column(logprob), column(lse), column(entropy)};
  return ops::concat(parts, 1);
}

Tensor plain_scores(const Place& place, const Tensor& x, const Tensor& w, const std::vector<std::int32_t>& y) {
  const std::int64_t rows = x.size(0), v = w.size(0);
  const Tensor logits = ops::matmul(x, ops::transpose(w, 0, 1)), l = ops::log_softmax(logits);
  std::vector<double> pick(static_cast<std::size_t>(rows * v), 0.0);
  for (std::int64_t t = 0; t < rows; ++t)
    if (y[static_cast<std::size_t>(t)] >= 0) pick[static_cast<std::size_t>(t * v + y[static_cast<std::size_t>(t)])] = 1;
  const Tensor logprob = ops::sum(ops::mul(l, make(place.device, pick, Dims{rows, v}, place.dtype)), 1);
  const Tensor lse = ops::sum(ops::sub(ops::slice(logits, 1, 0, 1), ops::slice(l, 1, 0, 1)), 1);
  return joined(logprob, lse, ops::scale(ops::sum(ops::mul(ops::exp(l), l), 1), -1));
}

std::vector<Case> score_cases() {
  std::vector<Case> cases;
  struct Shape { std::int64_t rows, cols, vocabulary; };
  for (auto [rows, cols, vocabulary] : {Shape{1, 1, 2}, {3, 17, 5}, {31, 33, 65}, {65, 16, 257}, {66, 33, 500}}) {
    const std::vector<std::int32_t> y = targets_of(rows, vocabulary);
    cases.push_back({"scores_" + std::to_string(vocabulary), {{{rows, cols}, -1, 1}, {{vocabulary, cols}, -1, 1, false, true}},
                     [y](const Place& p, Ins t) {
                       const ops::HeadScore s = ops::linear_cross_entropy(t[0], t[1], p.rows(y), nullptr, true);
                       return joined(s.logprob, s.logsumexp, s.entropy);
                     },
                     [y](const Place& p, Ins t) { return plain_scores(p, t[0], t[1], y); }, true, false});
  }
  return cases;
}
CAPSTAN_OP_CASES(CrossEntropy, score_cases());

struct Gradients { double objective; Tensor dx, dw; };

Gradients run(Device& device, DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t vocabulary, bool in_forward, int passes = 1) {
  const std::vector<std::int32_t> y = targets_of(rows, vocabulary);
  const Tensor targets = Tensor::of(std::span<const std::int32_t>(y), Dims{rows}, device);
  const Tensor weights = make(device, random_values(rows, 7, -1, 2), Dims{rows}, DType::f32);
  const auto input = [&](const Dims& shape, std::uint64_t seed) {  // bf16 numbers in every type
    return make(device, random_values(shape.product(), seed), shape, DType::bf16).to(dtype);
  };
  const Tensor x = make_leaf(input(Dims{rows, cols}, 1), false), w = make_leaf(input(Dims{vocabulary, cols}, 2), true);
  Gradients g;
  for (int i = 0; i < passes; ++i) {
    Tensor objective;
    if (in_forward) {
      objective = ops::linear_cross_entropy(x, w, targets, &weights, true).objective;
    } else {
      const Tensor logprob = ops::linear_cross_entropy(x, w, targets, nullptr, true).logprob;
      objective = ops::scale(ops::sum_all(ops::mul(logprob, weights.to(logprob.dtype()))), -1);
    }
    g.objective = objective.item();
    backward(objective);
  }
  g.dx = static_cast<Leaf*>(x.node().get())->grad(), g.dw = static_cast<Leaf*>(w.node().get())->grad();
  return g;
}

TEST(CrossEntropyObjective, HasTheGradientOfTheScores) {
  auto device = tested_device(2);
  const Gradients exact = run(*device, DType::f64, 65, 33, 257, false);
  for (DType dtype : {DType::f64, DType::f32, DType::bf16})
    for (bool in_forward : {true, false}) {
      SCOPED_TRACE(std::string(name_of(dtype)) + (in_forward ? " in the forward" : " later"));
      const Gradients g = run(*device, dtype, 65, 33, 257, in_forward);
      EXPECT_NEAR(g.objective, exact.objective, std::abs(exact.objective) * bounds::objective(dtype));
      EXPECT_TRUE(near(g.dx, exact.dx, dtype));
      EXPECT_TRUE(near(g.dw, exact.dw, dtype));
    }
}

TEST(CrossEntropyObjective, AddsIntoTheWeightsGradient) {
  auto device = tested_device(2);
  const std::vector<double> once = doubles(run(*device, DType::f32, 31, 17, 65, true).dw);
  std::vector<double> want = once;
  for (double& v : want) v *= 3;
  EXPECT_TRUE(near(doubles(run(*device, DType::f32, 31, 17, 65, true, 3).dw), want, tolerance_of(DType::f32)));
}

// 4096 rows of 16384 logits in f32 would be 256 MiB: half of that at a time, forward and backward.
TEST(CrossEntropyObjective, HoldsAChunkOfLogits) {
  constexpr std::int64_t rows = 4096, vocabulary = 16384, most = std::int64_t{128} << 20;
  auto device = tested_device(2);
  device->reset_peak();
  run(*device, DType::f32, rows, 2, vocabulary, true);
  EXPECT_GT(device->bytes_peak(), most / 2);
  EXPECT_LT(device->bytes_peak(), most + (std::int64_t{4} << 20)) << "more than one chunk, beside inputs and gradients";
}

// The vocabulary is so large that 33 rows take several chunks; the reference is a loop over tokens.
TEST(CrossEntropyObjective, ChunksMakeTheWhole) {
  constexpr std::int64_t rows = 33, vocabulary = 600001;
  auto device = tested_device(2);
  const Gradients got = run(*device, DType::f64, rows, 2, vocabulary, true);
  const auto input = [&](const Dims& shape, std::uint64_t seed) { return doubles(make(*device, random_values(shape.product(), seed), shape, DType::bf16)); };
  const std::vector<double> x = input(Dims{rows, 2}, 1), w = input(Dims{vocabulary, 2}, 2);
  const std::vector<double> weights = doubles(make(*device, random_values(rows, 7, -1, 2), Dims{rows}, DType::f32));
  const std::vector<std::int32_t> y = targets_of(rows, vocabulary);
  std::vector<double> dx(x.size(), 0.0), dw(w.size(), 0.0), p(static_cast<std::size_t>(vocabulary));
  double objective = 0;
  for (std::size_t t = 0; t < static_cast<std::size_t>(rows); ++t) {
    if (y[t] < 0) continue;
    const double a = x[2 * t], b = x[2 * t + 1];
    double sum = 0;
    for (std::size_t j = 0; j < p.size(); ++j) sum += p[j] = std::exp(a * w[2 * j] + b * w[2 * j + 1]);
    objective -= weights[t] * std::log(p[static_cast<std::size_t>(y[t])] / sum);
    for (std::size_t j = 0; j < p.size(); ++j) {
      const double g = weights[t] * (p[j] / sum - (static_cast<std::size_t>(y[t]) == j ? 1 : 0));
      dx[2 * t] += g * w[2 * j], dx[2 * t + 1] += g * w[2 * j + 1], dw[2 * j] += g * a, dw[2 * j + 1] += g * b;
    }
  }
  EXPECT_NEAR(got.objective, objective, 1e-12 * std::abs(objective));
  EXPECT_TRUE(near(doubles(got.dx), dx, tolerance_of(DType::f64)));
  EXPECT_TRUE(near(doubles(got.dw), dw, tolerance_of(DType::f64)));
}

TEST(CrossEntropy, ARowWithoutATargetScoresZeroAndLearnsNothing) {
  auto device = tested_device(1);
  const std::vector<std::int32_t> y = {-1, 2};
  const Tensor targets = Tensor::of(std::span<const std::int32_t>(y), Dims{2}, *device), weights = Tensor::full(Dims{2}, 1, DType::f32, *device);
  const Tensor x = make_leaf(make(*device, random_values(6, 1), Dims{2, 3}, DType::f32), false), w = make_leaf(make(*device, random_values(12, 2), Dims{4, 3}, DType::f32), true);
  const ops::HeadScore s = ops::linear_cross_entropy(x, w, targets, &weights, true);
  EXPECT_EQ(doubles(s.logprob)[0], 0);
  EXPECT_LT(doubles(s.logprob)[1], 0);
  EXPECT_EQ(s.objective.item(), -doubles(s.logprob)[1]);
  backward(s.objective);
  const std::vector<double> dx = doubles(static_cast<Leaf*>(x.node().get())->grad());
  for (int c = 0; c < 3; ++c) EXPECT_EQ(dx[static_cast<std::size_t>(c)], 0);
  EXPECT_NE(dx[3], 0);
}

TEST(CrossEntropy, HoldsLargeLogits) {
  auto device = tested_device(1);
  const std::vector<std::int32_t> y = {0, 1};
  const Tensor targets = Tensor::of(std::span<const std::int32_t>(y), Dims{2}, *device);
  const Tensor x = make(*device, {1, 1}, Dims{2, 1}, DType::f32), w = make(*device, {1e4, -1e4, 0}, Dims{3, 1}, DType::f32);
  const ops::HeadScore s = ops::linear_cross_entropy(x, w, targets, nullptr, false);
  EXPECT_EQ(doubles(s.logprob), (std::vector<double>{0, -2e4}));
  EXPECT_EQ(doubles(s.logsumexp), (std::vector<double>{1e4, 1e4}));
  EXPECT_EQ(doubles(s.entropy), (std::vector<double>{0, 0}));
  EXPECT_FALSE(s.logprob.requires_grad());
}

TEST(CrossEntropy, SaysWhatDoesNotFit) {
  auto device = tested_device(1);
  const auto t = [&](const Dims& shape) { return Tensor::zeros(shape, DType::f32, *device); };
  const auto ids = [&](const std::vector<std::int32_t>& y) { return Tensor::of(std::span<const std::int32_t>(y), Dims{static_cast<std::int64_t>(y.size())}, *device); };
  EXPECT_THAT(error_of([&] { ops::linear_cross_entropy(t({2, 3}), t({5, 4}), ids({0, 1}), nullptr, false); }), HasSubstr("[2, 3] and [5, 4]"));
  EXPECT_THAT(error_of([&] { ops::linear_cross_entropy(t({2, 3}), t({5, 3}), ids({0}), nullptr, false); }), HasSubstr("i32 [2]"));
  EXPECT_THAT(error_of([&] { ops::linear_cross_entropy(t({2, 3}), t({5, 3}), ids({0, 5}), nullptr, false), device->synchronize(); }),
              HasSubstr(device->kind() == DeviceKind::cpu ? "target 5 of row 1" : "element 1 is 5, out of range"));
  const Tensor weights = t({3});
  EXPECT_THAT(error_of([&] { ops::linear_cross_entropy(t({2, 3}), t({5, 3}), ids({0, 1}), &weights, false); }), HasSubstr("expected f32 [2]"));
  const Tensor x = make_leaf(t({2, 3}), false), two = Tensor::full(Dims{2}, 1, DType::f32, *device);
  const Tensor objective = ops::linear_cross_entropy(x, t({5, 3}), ids({0, 1}), &two, true).objective;
  if (device->kind() == DeviceKind::cpu) {  // a GPU's number is not waited for
    EXPECT_THAT(error_of([&] { backward(ops::scale(objective, 2)); }), HasSubstr("must be 1"));
  }
}

}  // namespace
}  // namespace capstan::testing
