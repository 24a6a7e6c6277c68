// Mesh invariance: the same recipe on every factorization of 2, 4 and 8 ranks gives the initial bits, the loss and every
// parameter's gradient of one rank, and its loss curve.
#include "core/invariance/support.h"

#include <gtest/gtest.h>
#include <support/tolerance.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <tuple>

namespace capstan::invariance {
namespace {

/// The run on one rank, made once in a process.
const Trained& reference(const std::string& form, const std::string& type, int steps) {
  static std::map<std::tuple<std::string, std::string, int>, Trained> runs;
  auto [it, fresh] = runs.try_emplace({form, type, steps});
  if (fresh) {
    auto words = overrides_of(form);
    words.push_back("precision.compute=" + type);
    it->second = train_on({}, words, steps);
  }
  return it->second;
}

double norm(const std::vector<double>& v) {
  double s = 0;
  for (const double x : v) s += x * x;
  return std::sqrt(s);
}

struct Case {
  Layout layout;
  std::string form, type;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.layout.name() << "/" << c.form << "/" << c.type; }

/// Every layout in f64 and f32 with parameters in pieces, one form each in turn and all forms up to 4 ranks; the other
/// strategies where something is cut.
std::vector<Case> cases() {
  std::vector<Case> all;
  const auto every = forms();
  std::size_t turn = 0;
  for (const int world : {2, 4, 8})
    for (const Layout& layout : layouts_of(world)) {
      for (const std::string& form : every) {
        if (world < 8 || form == every[turn % every.size()]) {
          all.push_back({layout, form, "f64"});
          all.push_back({layout, form, "f32"});
        } else {
          all.push_back({layout, form, "f64"});
        }
      }
      ++turn;
      if (layout.shard * layout.context == 1 || layout.pp > 1) continue;
      for (const char* strategy : {"zero2", "zero1", "ddp"}) {
        Layout other = layout;
        other.strategy = strategy;
        all.push_back({other, every[turn % every.size()], "f64"});
      }
    }
  return all;
}

class Invariance : public ::testing::TestWithParam<Case> {};

TEST_P(Invariance, LossAndEveryGradientAreThoseOfOneRank) {
  const auto& [layout, form, type] = GetParam();
  const Trained one = reference(form, type, 2);
  auto words = overrides_of(form);
  words.push_back("precision.compute=" + type);
  const Trained run = train_on(layout, words, 2);
  ASSERT_EQ(run.losses.size(), 2u);
  const DType dtype = dtype_from(type);
  const double tolerance = bounds::mesh(dtype);

  ASSERT_EQ(run.initial.size(), one.initial.size());
  for (const auto& [name, values] : one.initial) EXPECT_TRUE(run.initial.at(name) == values) << name << ": initial bits differ";

  for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(run.losses[i], one.losses[i], bounds::curve(dtype)) << "step " << i + 1;
  EXPECT_NEAR(run.norms[0] / one.norms[0], 1, tolerance);

  double whole = 0;
  for (const auto& [name, g] : one.gradients) whole += norm(g) * norm(g);
  whole = std::sqrt(whole);
  ASSERT_EQ(run.gradients.size(), one.gradients.size());
  for (const auto& [name, g0] : one.gradients) {
    std::vector<double> difference = run.gradients.at(name);
    ASSERT_EQ(difference.size(), g0.size()) << name;
    for (std::size_t i = 0; i < g0.size(); ++i) difference[i] -= g0[i];
    EXPECT_LE(norm(difference), tolerance * std::max(norm(g0), 1e-3 * whole)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Invariance, ::testing::ValuesIn(cases()), [](const auto& info) {
  return info.param.layout.name() + "_" + info.param.form + "_" + info.param.type;
});

class Schedules : public ::testing::TestWithParam<std::tuple<std::string, Layout, std::string>> {};

TEST_P(Schedules, EveryPipelineScheduleGivesTheGradientsOfOneRank) {
  const auto& [schedule, layout, form] = GetParam();
  auto words = overrides_of(form);
  words.push_back("precision.compute=f64");
  const Trained one = reference(form, "f64", 2);
  words.push_back("mesh.pipeline.schedule=" + schedule);
  if (schedule == "interleaved") words.push_back("mesh.pipeline.stages_per_rank=2");
  const Trained run = train_on(layout, words, 2);
  ASSERT_EQ(run.losses.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(run.losses[i], one.losses[i], bounds::curve(DType::f64));
  ASSERT_EQ(run.gradients.size(), one.gradients.size());
  for (const auto& [name, g0] : one.gradients) {
    std::vector<double> difference = run.gradients.at(name);
    for (std::size_t i = 0; i < g0.size(); ++i) difference[i] -= g0[i];
    EXPECT_LE(norm(difference), bounds::mesh(DType::f64) * std::max(norm(g0), 1e-3 * one.norms[0])) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Pipelines, Schedules,
                         ::testing::Combine(::testing::Values("gpipe", "1f1b", "interleaved", "zero_bubble"),
                                            ::testing::Values(Layout{2, 1, 1, 1, 1}, Layout{4, 1, 1, 1, 1}, Layout{2, 1, 2, 1, 1}, Layout{2, 1, 2, 1, 1, "zero1"},
                                                              Layout{2, 1, 2, 1, 2}),
                                            ::testing::ValuesIn(forms())),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param).name() + "_" + std::get<2>(info.param); });

class Curve : public ::testing::TestWithParam<Layout> {};

TEST_P(Curve, ThirtyStepsFollowThoseOfOneRank) {
  const Trained one = reference("llama", "f32", 30);
  auto words = overrides_of("llama");
  words.push_back("precision.compute=f32");
  const Trained run = train_on(GetParam(), words, 30, false);
  ASSERT_EQ(run.losses.size(), 30u);
  EXPECT_LT(one.losses.back(), one.losses.front() - 0.3);
  for (std::size_t i = 0; i < 30; ++i) EXPECT_NEAR(run.losses[i], one.losses[i], bounds::curve(DType::f32)) << "step " << i + 1;
}

std::vector<Layout> curves() {
  std::vector<Layout> all;
  for (const int world : {2, 4, 8})
    for (const Layout& layout : layouts_of(world)) all.push_back(layout);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Layouts, Curve, ::testing::ValuesIn(curves()), [](const auto& info) { return info.param.name(); });

}  // namespace
}  // namespace capstan::invariance
