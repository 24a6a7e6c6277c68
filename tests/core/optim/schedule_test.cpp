// LearningRate: points worked out by hand from each schedule's definition, and what holds at every step.
#include "optim/schedule.h"

#include "recipe/recipe.h"
#include "recipe/run_schema.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace capstan {
namespace {

TEST(Schedule, WarmsUpOnALineToThePeak) {
  const LearningRate rate(Schedule{.warmup = 10});
  EXPECT_DOUBLE_EQ(rate.factor(1, 100), 0.1);
  EXPECT_DOUBLE_EQ(rate.factor(5, 100), 0.5);
  EXPECT_DOUBLE_EQ(rate.factor(10, 100), 1);
  EXPECT_DOUBLE_EQ(rate.factor(55, 100), 1);
  EXPECT_DOUBLE_EQ(rate.factor(100, 100), 1);
}

TEST(Schedule, CosineFallsFromPeakToFinal) {
  const LearningRate rate(Schedule{.warmup = 20, .decay = Decay::cosine, .final = 0.2});
  EXPECT_DOUBLE_EQ(rate.factor(20, 120), 1);
  EXPECT_NEAR(rate.factor(45, 120), 0.2 + 0.8 * (1 + std::sqrt(0.5)) / 2, 1e-15);  // a quarter: cos(pi / 4)
  EXPECT_NEAR(rate.factor(70, 120), 0.6, 1e-15);                                   // half way
  EXPECT_NEAR(rate.factor(120, 120), 0.2, 1e-15);
}

TEST(Schedule, LinearFallsOnALine) {
  const LearningRate rate(Schedule{.decay = Decay::linear, .final = 0});
  EXPECT_DOUBLE_EQ(rate.factor(1, 4), 0.75);
  EXPECT_DOUBLE_EQ(rate.factor(2, 4), 0.5);
  EXPECT_DOUBLE_EQ(rate.factor(4, 4), 0);
}

TEST(Schedule, WsdStaysAtThePeakAndFallsAtTheEnd) {
  Schedule s{.warmup = 10, .decay = Decay::wsd, .final = 0.01, .decay_steps = 16};
  const auto at = [&](DecayShape shape, std::int64_t step) {
    s.decay_shape = shape;
    return LearningRate(s).factor(step, 100);
  };
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::sqrt, DecayShape::exponential}) {
    EXPECT_DOUBLE_EQ(at(shape, 9), 0.9);
    EXPECT_DOUBLE_EQ(at(shape, 10), 1);
    EXPECT_DOUBLE_EQ(at(shape, 84), 1);
    EXPECT_LT(at(shape, 85), 1);
    EXPECT_NEAR(at(shape, 100), 0.01, 1e-15);
  }
  // A quarter of the fall has passed at step 88.
  EXPECT_NEAR(at(DecayShape::linear, 88), 0.01 + 0.99 * 0.75, 1e-15);
  EXPECT_NEAR(at(DecayShape::cosine, 88), 0.01 + 0.99 * (1 + std::sqrt(0.5)) / 2, 1e-15);
  EXPECT_NEAR(at(DecayShape::sqrt, 88), 0.01 + 0.99 * 0.5, 1e-15);
  EXPECT_NEAR(at(DecayShape::exponential, 92), 0.1, 1e-15);  // half way: the geometric mean
}

TEST(Schedule, WsdFallsOverAFifthUnlessTold) {
  const LearningRate rate(Schedule{.decay = Decay::wsd, .final = 0});
  EXPECT_DOUBLE_EQ(rate.factor(80, 100), 1);
  EXPECT_DOUBLE_EQ(rate.factor(90, 100), 0.5);
}

TEST(Schedule, NeverLeavesItsRangeNorRisesAfterWarmup) {
  for (const Decay decay : {Decay::constant, Decay::cosine, Decay::linear, Decay::wsd}) {
    for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::sqrt, DecayShape::exponential}) {
      for (const std::int64_t warmup : {0, 1, 7, 30}) {
        for (const std::int64_t total : {1, 2, 7, 30}) {
          const LearningRate rate(Schedule{.warmup = warmup, .decay = decay, .final = 0.1, .decay_steps = 12, .decay_shape = shape});
          double previous = 1;
          for (std::int64_t step = 1; step <= total + 3; ++step) {
            const double f = rate.factor(step, total);
            EXPECT_GT(f, 0);
            EXPECT_LE(f, 1);
            if (step > warmup) {
              EXPECT_LE(f, previous);
              EXPECT_GE(f, 0.1 - 1e-15);
            }
            if (step >= warmup) previous = f;
          }
        }
      }
    }
  }
}

Options schedule_group(const std::string& yaml) { return parse_options(*run_schema().find("schedule")->group, yaml); }

TEST(Schedule, ReadsTheRecipe) {
  const Schedule s = LearningRate(schedule_group("{warmup: 12, decay: wsd, final: 0.05, decay_steps: 40, decay_shape: sqrt}")).schedule();
  EXPECT_EQ(s.warmup, 12);
  EXPECT_EQ(s.decay, Decay::wsd);
  EXPECT_DOUBLE_EQ(s.final, 0.05);
  EXPECT_EQ(s.decay_steps, 40);
  EXPECT_EQ(s.decay_shape, DecayShape::sqrt);
  const std::pair<const char*, Decay> decays[] = {
      {"constant", Decay::constant}, {"cosine", Decay::cosine}, {"linear", Decay::linear}, {"wsd", Decay::wsd}};
  for (const auto& [name, decay] : decays) {
    EXPECT_EQ(LearningRate(schedule_group(std::string("{decay: ") + name + "}")).schedule().decay, decay);
  }
  const std::pair<const char*, DecayShape> shapes[] = {{"linear", DecayShape::linear}, {"cosine", DecayShape::cosine},
                                                       {"sqrt", DecayShape::sqrt}, {"exponential", DecayShape::exponential}};
  for (const auto& [name, shape] : shapes) {
    EXPECT_EQ(LearningRate(schedule_group(std::string("{decay: wsd, decay_shape: ") + name + "}")).schedule().decay_shape, shape);
  }
}

TEST(Schedule, RefusesAnExponentialFallToZero) {
  try {
    LearningRate(schedule_group("{decay: wsd, decay_shape: exponential, final: 0}"));
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::input);
    EXPECT_NE(std::string(e.what()).find("final"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace capstan
