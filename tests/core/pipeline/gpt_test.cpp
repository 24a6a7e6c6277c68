// GPTs over pipeline ranks: tied embeddings on the first and the last stage, ragged packed microbatches, input and weight part of
// every op apart.
#include "tests/plugins/models/fixture.h"  // first: it means gtest's namespace, threads.h opens one of its name
#include <support/tolerance.h>

#include "pipeline/executor.h"
#include "pipeline/stages.h"
#include "tests/core/comm/threads.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace capstan::test {
namespace {

using pipeline::Plan;
using pipeline::ScheduleKind;
using ::testing::Each;
using ::testing::ElementsAre;

const Overrides small{{"layers", "3"}, {"width", "16"}, {"heads", "2"}, {"context", "32"}, {"vocabulary", "29"}, {"dropout", "0.1"}};

class PipelinedGpt : public GptFixture {
 protected:
  using Gradients = std::map<std::string, std::vector<double>>;
  struct Result {
    Gradients gradients;
    std::map<std::string, int> holders;
    std::vector<double> losses;
  };

  /// Packed sequences of these lengths; targets are the next tokens, some left out.
  static Batch packed(Device& device, const std::vector<std::int32_t>& lengths, int m, double step_weight) {
    std::int64_t rows = 0;
    for (const auto l : lengths) rows += l;
    const auto ids = tokens(rows, 29, 100 + static_cast<std::uint64_t>(m));
    std::vector<std::int32_t> targets(ids.begin() + 1, ids.end());
    targets.push_back(-1);
    std::vector<float> weight;
    for (const auto t : targets) weight.push_back(t < 0 || t % 7 == 0 ? 0.f : 1.f);
    Batch b = make_batch(device, ids, lengths, targets, weight, 1000 * m);
    b.step_weight = step_weight;
    return b;
  }
  const std::vector<std::vector<std::int32_t>> step_{{7, 9}, {16}, {3, 1, 5}, {16}, {2, 20}};

  void add(Result& r, const Model& model) {
    for (Parameter* p : model.parameters()) {
      if (!p->leaf()->has_grad()) continue;
      const auto g = values(p->leaf()->grad());
      auto& sum = r.gradients[p->name()];
      sum.resize(g.size());
      for (std::size_t i = 0; i < g.size(); ++i) sum[i] += g[i];
      ++r.holders[p->name()];
    }
  }

  Result alone(const Overrides& options, DType dtype, bool recompute) {
    const auto device = make_cpu_device(1);
    const auto model = make(options);
    place(*model, *device, dtype, 0.05, true);
    Result r;
    for (std::size_t m = 0; m < step_.size(); ++m) {
      const Batch b = packed(*device, step_[m], static_cast<int>(m), 50);
      ForwardContext c(b, *device, dtype);
      c.grad = c.training = true;
      forward_backward(*model, c, {}, recompute);
      for (const auto& l : c.losses()) r.losses.push_back(l.sum.item());
    }
    add(r, *model);
    return r;
  }

  Result piped(const Overrides& options, DType dtype, bool recompute, const Plan& plan) {
    std::vector<std::shared_ptr<Model>> models;
    for (int rank = 0; rank < plan.ranks; ++rank) models.push_back(make(options));
    const auto scratch = make(options);
    const auto costs = pipeline::call_costs(*scratch, 2, 16, dtype);
    Result r;
    std::mutex mutex;
    const auto errors = capstan::testing::on_ranks(plan.ranks, 20, [&](World& world) {
      std::vector<int> all;
      for (int k = 0; k < world.size(); ++k) all.push_back(k);
      const auto pp = world.make("pp", all);
      const auto device = make_cpu_device(1);
      Model& model = *models[static_cast<std::size_t>(world.rank())];
      place(model, *device, dtype, 0.05, true);
      pipeline::Executor executor(model, *pp, plan, pipeline::cut_into_stages(costs, plan.stages()), {recompute, {}});
      std::deque<Batch> batches;
      std::deque<ForwardContext> contexts;
      std::vector<ForwardContext*> pointers;
      for (std::size_t m = 0; m < step_.size(); ++m) {
        batches.push_back(packed(*device, step_[m], static_cast<int>(m), 50));
        contexts.emplace_back(batches.back(), *device, dtype);
        contexts.back().grad = contexts.back().training = true;
        pointers.push_back(&contexts.back());
      }
      const auto losses = executor.run(pointers);
      EXPECT_EQ(losses.empty(), world.rank() + 1 != world.size());
      const std::lock_guard lock(mutex);
      for (const auto& l : losses) r.losses.push_back(l.sum.item());
      add(r, model);
    });
    EXPECT_THAT(errors, Each(""));
    return r;
  }

  static void expect_equal(const Result& a, const Result& b, double tolerance, const std::string& where) {
    EXPECT_EQ(a.losses, b.losses) << where;
    ASSERT_EQ(a.gradients.size(), b.gradients.size()) << where;
    for (const auto& [name, g] : b.gradients) {
      double square = 0, off = 0;
      for (std::size_t i = 0; i < g.size(); ++i) square += g[i] * g[i], off += std::pow(a.gradients.at(name)[i] - g[i], 2);
      EXPECT_LE(std::sqrt(off), tolerance * std::sqrt(square)) << where << " " << name;
      if (a.holders.at(name) == 1) {
        EXPECT_EQ(a.gradients.at(name), g) << where << " " << name;
      }
    }
  }
};

TEST_F(PipelinedGpt, HasTheGradientsOfOnePiece) {
  for (const Overrides& form : {gpt2_form, llama_form, qwen_form})
    for (const bool recompute : {false, true}) {
      const Overrides options = small + form;
      const Result wide = alone(options, DType::f64, recompute), narrow = alone(options, DType::f32, recompute);
      for (const Plan& plan : {Plan{ScheduleKind::gpipe, 2, 1}, Plan{ScheduleKind::one_f_one_b, 2, 1}, Plan{ScheduleKind::interleaved, 2, 2},
                               Plan{ScheduleKind::one_f_one_b, 4, 1}, Plan{ScheduleKind::zero_bubble, 4, 1}, Plan{ScheduleKind::zero_bubble, 2, 2}}) {
        const std::string where = std::string(name_of(plan.kind)) + " " + std::to_string(plan.ranks) + " x " + std::to_string(plan.stages_per_rank) +
                                  (recompute ? " recompute" : "") + (form.at("tied") == "true" ? " tied" : "");
        const Result piped64 = piped(options, DType::f64, recompute, plan);
        expect_equal(piped64, wide, bounds::reordered(DType::f64), where);
        expect_equal(piped(options, DType::f32, recompute, plan), narrow, bounds::reordered(DType::f32), where + " f32");
        EXPECT_EQ(piped64.holders.at("tokens.weight"), form.at("tied") == "true" ? 2 : 1) << where;
      }
    }
}

TEST_F(PipelinedGpt, StagesCountEmbeddingAndHead) {
  const auto model = make(small + llama_form + Overrides{{"layers", "8"}, {"vocabulary", "4000"}});
  const auto costs = pipeline::call_costs(*model, 2, 32, DType::f32);
  const auto cut = pipeline::cut_into_stages(costs, 4);
  const auto stages = pipeline::stage_costs(costs, cut);
  // The head over 4,000 words outweighs the blocks: it stands alone.
  EXPECT_EQ(std::count(cut.begin(), cut.end(), 3), 1);
  EXPECT_GT(stages.forward[3], stages.forward[0]);
  const auto shared = make(small + gpt2_form);
  const auto tied = pipeline::tied_parameters(*shared, pipeline::cut_into_stages(pipeline::call_costs(*shared, 2, 16, DType::f32), 2));
  ASSERT_EQ(tied.size(), 1u);
  EXPECT_EQ(tied[0].parameter->name(), "tokens.weight");
  EXPECT_THAT(tied[0].stages, ElementsAre(0, 1));
}

}  // namespace
}  // namespace capstan::test
