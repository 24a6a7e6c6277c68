// fp8 over ranks: where each microbatch is whole on its rank its scales are those of one rank, and so are loss and
// gradients; copies of gathered weights go with them.
#include "core/invariance/support.h"

#include <gtest/gtest.h>
#include <support/tolerance.h>

#include <algorithm>
#include <cmath>
#include <mutex>

namespace capstan::invariance {
namespace {

std::vector<std::string> words_of(const std::string& linear) {
  return {
      "model={plugin: gpt, layers: 4, heads: 4, width: 32, context: 32, vocabulary: 257, ffn: 64, tied: true, dropout: 0.1}",
      "precision.compute=f32", "precision.linear=" + linear};
}

double norm(const std::vector<double>& v) {
  double s = 0;
  for (const double x : v) s += x * x;
  return std::sqrt(s);
}

class Fp8Invariance : public ::testing::TestWithParam<std::tuple<std::string, Layout>> {};

TEST_P(Fp8Invariance, LossAndEveryGradientAreThoseOfOneRank) {
  const auto& [linear, layout] = GetParam();
  const Trained one = train_on({}, words_of(linear), 1), run = train_on(layout, words_of(linear), 1),
                plain = train_on({}, words_of("compute"), 1);
  EXPECT_NEAR(run.losses[0], one.losses[0], bounds::mesh(DType::f32));
  EXPECT_GT(std::abs(plain.norms[0] / one.norms[0] - 1), bounds::mesh(DType::f32)) << "nothing was rounded";
  for (const auto& [name, g0] : one.gradients) {
    std::vector<double> difference = run.gradients.at(name);
    for (std::size_t i = 0; i < g0.size(); ++i) difference[i] -= g0[i];
    EXPECT_LE(norm(difference), bounds::mesh(DType::f32) * std::max(norm(g0), 1e-3 * one.norms[0])) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Fp8Invariance,
                         ::testing::Combine(::testing::Values("fp8", "mxfp8"),
                                            ::testing::Values(Layout{1, 1, 2, 1, 1}, Layout{1, 2, 1, 1, 1},
                                                              Layout{2, 1, 1, 1, 1}, Layout{1, 1, 2, 1, 1, "zero1"})),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param).name(); });

TEST(Fp8Memory, CopiesGoWithTheWeightsThatWereGathered) {
  for (const bool reshard : {true, false}) {
    std::mutex mutex;
    std::vector<std::int64_t> held;
    auto words = words_of("fp8");
    words.push_back(std::string("mesh.reshard_after_forward=") + (reshard ? "true" : "false"));
    on_ranks(Layout{1, 1, 2, 1, 1}, words, [&](train::Session& session) {
      session.engine->initialize();
      const std::vector<std::int32_t> tokens(24, 65), lengths{24};
      Batch batch = make_batch(*session.device, tokens, lengths, tokens);
      batch.step_weight = 48;
      const std::int64_t before = session.device->bytes_held();
      session.engine->forward_backward(batch, 1);
      std::int64_t bytes = 0;
      for (const Parameter* p : session.model->parameters()) bytes += p->derived_bytes();
      const std::lock_guard lock(mutex);
      held.push_back(bytes);
      EXPECT_LE(session.device->bytes_held() - before, 4096 + batch.space().capacity * 64) << "and nothing else keeps them";
    });
    for (const std::int64_t bytes : held) EXPECT_EQ(bytes, 0);
  }
}

}  // namespace
}  // namespace capstan::invariance
