// Stages: costs of calls, the best cut, what crosses it, and which parameters several stages share.
#include "pipeline/stages.h"
#include "tests/core/pipeline/chain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

namespace capstan::pipeline {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using namespace pipeline_test;

std::vector<CallCost> costs_of(const std::vector<double>& totals) {
  std::vector<CallCost> costs;
  for (const double t : totals) costs.push_back({t, 0, 0});
  return costs;
}

double most(const std::vector<double>& totals, const std::vector<int>& cut) {
  std::vector<double> sums(static_cast<std::size_t>(cut.back()) + 1, 0);
  for (std::size_t i = 0; i < totals.size(); ++i) sums[static_cast<std::size_t>(cut[i])] += totals[i];
  return *std::max_element(sums.begin(), sums.end());
}

/// The least maximum over every way to put stages - 1 cuts between calls.
double exhaustive(const std::vector<double>& totals, int stages) {
  double best = std::numeric_limits<double>::infinity();
  for (unsigned mask = 0; mask < (1u << (totals.size() - 1)); ++mask) {
    if (__builtin_popcount(mask) != stages - 1) continue;
    std::vector<int> cut{0};
    for (std::size_t i = 1; i < totals.size(); ++i) cut.push_back(cut.back() + static_cast<int>(mask >> (i - 1) & 1));
    best = std::min(best, most(totals, cut));
  }
  return best;
}

TEST(Stages, AreTheBestCut) {
  const Rng rng(1, "costs");
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<double> totals;
    for (int i = 0; i < 10; ++i) totals.push_back(1 + static_cast<double>(rng.below(static_cast<std::uint64_t>(trial * 10 + i), 20)));
    for (int stages = 1; stages <= 10; ++stages) {
      const std::vector<int> cut = cut_into_stages(costs_of(totals), stages);
      EXPECT_EQ(cut.front(), 0);
      EXPECT_EQ(cut.back(), stages - 1);
      for (std::size_t i = 1; i < cut.size(); ++i) EXPECT_TRUE(cut[i] == cut[i - 1] || cut[i] == cut[i - 1] + 1);
      EXPECT_DOUBLE_EQ(most(totals, cut), exhaustive(totals, stages));
    }
  }
  // The head is long: the rest is cut evenly.
  EXPECT_THAT(cut_into_stages(costs_of({0, 1, 1, 1, 1, 9}), 3), ElementsAre(0, 0, 0, 1, 1, 2));
}

TEST(Stages, AreAtMostTheCalls) {
  try {
    cut_into_stages(costs_of({1, 1, 1}), 4, "r.yaml:3, mesh.pp");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::input);
    EXPECT_THAT(e.what(), ::testing::AllOf(HasSubstr("[r.yaml:3, mesh.pp] "), HasSubstr("3 calls"), HasSubstr("4 stages")));
  }
}

TEST(Stages, CostsAreThoseOfTheStep) {
  Chain model(6);
  const auto meta = make_meta_device();
  const Batch batch = batch_of(*meta, 32, 0);
  const auto costs = call_costs(model, batch, DType::f32, false, 0);  // FLOPs alone
  ASSERT_EQ(costs.size(), 8u);
  const double product = 2.0 * 32 * width * width;  // rows x width x width
  double sum = 0;
  for (const CallCost& c : costs) {
    EXPECT_GE(c.forward, product);
    EXPECT_GE(c.weight, product);
    sum += c.total();
  }
  // All of a step is somebody's.
  Chain whole(6);
  const auto other = make_meta_device();
  whole.place(*other, DType::f32);
  const Batch same = batch_of(*other, 32, 0);
  ForwardContext context = context_of(same, *other, DType::f32);
  other->record(true);
  forward_backward(whole, context);
  EXPECT_DOUBLE_EQ(sum, other->total_cost().flop);
  EXPECT_LT(costs[0].input, 0.5 * product);  // nothing before the first call wants a gradient
  EXPECT_GE(costs[1].input, product);
  // Recomputation puts a second forward into the backward of all but the head.
  Chain again(6);
  const auto recomputed = call_costs(again, batch, DType::f32, true, 0);
  EXPECT_DOUBLE_EQ(recomputed[2].input, costs[2].input + costs[2].forward);
  EXPECT_DOUBLE_EQ(recomputed[7].input, costs[7].input);
  const Costs stages = stage_costs(costs, std::vector<int>{0, 0, 0, 0, 1, 1, 1, 1});
  ASSERT_EQ(stages.forward.size(), 2u);
  EXPECT_DOUBLE_EQ(stages.forward[0] + stages.forward[1], [&] { double s = 0; for (const auto& c : costs) s += c.forward; return s; }());
  // Bytes count where they are more than what is computed meanwhile.
  Chain third(6);
  EXPECT_GT(call_costs(third, batch, DType::f32, false, 1000)[2].forward, costs[2].forward);
}

TEST(Stages, CarryWhatLaterOnesRead) {
  Chain model(6);  // first, six middles (the fourth reads skip and order), head reads h and skip
  EXPECT_THAT(carried_values(model, std::vector<int>{0, 0, 1, 1, 1, 2, 2, 3}),
              ElementsAre(ElementsAre("h", "skip", "order"), ElementsAre("h", "skip"), ElementsAre("h", "skip"), IsEmpty()));
}

TEST(Stages, ShareTiedParameters) {
  Chain model(6);  // the block of calls 2 and 6 is one
  const auto tied = tied_parameters(model, std::vector<int>{0, 0, 1, 1, 2, 2, 3, 3});
  ASSERT_EQ(tied.size(), 1u);
  EXPECT_EQ(tied[0].parameter->name(), "middle1.w");
  EXPECT_THAT(tied[0].stages, ElementsAre(1, 3));
  EXPECT_THAT(tied_parameters(model, std::vector<int>{0, 0, 1, 1, 1, 1, 1, 2}), IsEmpty());
}

}  // namespace
}  // namespace capstan::pipeline
