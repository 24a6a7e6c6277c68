// Whole models under tensor x context ranks against one rank: loss, count, and every parameter's gradient, added over the
// ranks that hold a copy of an element. Nothing divides on purpose: heads, key/value heads, vocabulary, rows.
#include "core/parallel/support.h"
#include "parallel/context_cut.h"
#include "parallel/rows.h"
#include "plugins/models/fixture.h"

#include <capstan/walk.h>
#include <support/tolerance.h>

namespace capstan::parallel_test {
namespace {

using test::Overrides;
using test::operator+;

struct Form {
  std::string name;
  Overrides options;
};

const Overrides small{{"layers", "2"}, {"context", "32"}, {"vocabulary", "37"}};

const std::vector<Form>& forms() {
  static const std::vector<Form> all{
      {"gpt2", test::gpt2_form + small + Overrides{{"width", "12"}, {"heads", "3"}, {"ffn", "20"}, {"dropout", "0.2"}}},
      {"llama", test::llama_form + small +
                    Overrides{{"width", "16"}, {"heads", "6"}, {"kv_heads", "3"}, {"head_size", "4"}, {"ffn", "22"}}},
      {"qwen", test::qwen_form + small +
                   Overrides{{"width", "16"}, {"heads", "4"}, {"kv_heads", "2"}, {"ffn", "12"}, {"dropout", "0.1"}}},
      {"wide_groups", test::llama_form + small +
                          Overrides{{"width", "12"},
                                    {"heads", "4"},
                                    {"kv_heads", "1"},
                                    {"head_size", "6"},
                                    {"ffn", "9"},
                                    {"bias", "true"},
                                    {"norm", "layer"},
                                    {"vocabulary", "5"}}},
  };
  return all;
}

/// Ragged sequences, targets that are missing, weights that are not 1, rows of the dead sequence at the end.
Batch ragged(Device& device, std::int64_t vocabulary) {
  const std::vector<std::int32_t> lengths{7, 1, 13, 4};
  std::vector<std::int32_t> tokens, targets;
  std::vector<float> weights;
  const Rng rng(3, "parallel/tokens");
  for (std::uint64_t i = 0; i < 27; ++i) {
    tokens.push_back(static_cast<std::int32_t>(rng.below(i, static_cast<std::uint64_t>(vocabulary))));
    targets.push_back(
        i >= 25 || i % 6 == 5 ? -1 : static_cast<std::int32_t>(rng.below(100 + i, static_cast<std::uint64_t>(vocabulary))));
    weights.push_back(targets.back() < 0 ? 0.f : 0.5f + static_cast<float>(i % 3));
  }
  return make_batch(device, tokens, lengths, targets, weights, 1000);
}

struct Result {
  double loss = 0, count = 0;
  Gradients gradients;
};

class Models : public testing::TestWithParam<std::tuple<std::size_t, std::pair<int, int>>> {
 protected:
  PluginHost host{CAPSTAN_PROGRAM};

  std::shared_ptr<Model> make(const Overrides& options) {
    const std::vector<std::pair<std::string, std::string>> list(options.begin(), options.end());
    return host.make_as<Model>(host.choice("model", "gpt", list));
  }

  /// One microbatch on one rank; the results of all ranks add up in `result`.
  static void run(Model& model, const Rank& rank, DType dtype, bool recompute, Result& result, std::mutex& mutex) {
    const int context = rank.mesh ? rank.mesh->size("context") : 1, part = rank.mesh ? rank.mesh->coordinate("context") : 0;
    const std::vector<Parameter*> parameters = model.parameters();
    for (Parameter* p : parameters) place(*p, rank, dtype);
    const Batch batch = parallel::cut_context(ragged(*rank.device, model.vocabulary()), context, part, rank.tensor());
    EXPECT_EQ(batch.space().capacity % rank.tensor(), 0);
    ForwardContext c(batch, *rank.device, dtype);
    c.grad = c.training = true, c.step = 5, c.seed = 11, c.mesh = rank.mesh.get();
    forward_backward(model, c, {}, recompute);
    const std::lock_guard lock(mutex);
    for (const LossEntry& e : c.losses()) result.loss += e.sum.item(), result.count += e.count;
    result.gradients.add(parameters);
  }

  void check(const Form& form, int tensor, int context, DType dtype, bool recompute) {
    const double tolerance = bounds::mesh(dtype);
    Result alone, together;
    std::mutex mutex;
    run(*make(form.options), Rank(), dtype, false, alone, mutex);
    std::vector<std::shared_ptr<Model>> models;
    for (int r = 0; r < tensor * context; ++r) models.push_back(make(form.options));
    run_ranks(tensor * context, [&](std::shared_ptr<World> world) {
      run(*models[static_cast<std::size_t>(world->rank())], Rank(world, tensor, context), dtype, recompute, together, mutex);
    });
    const std::string what = form.name + " on tensor " + std::to_string(tensor) + " x context " + std::to_string(context);
    EXPECT_GT(alone.loss, 0.1);
    EXPECT_NEAR(together.loss, alone.loss, tolerance * alone.loss) << what;
    EXPECT_EQ(together.count, alone.count) << what;
    together.gradients.expect_near(alone.gradients, tolerance, what);
  }
};

TEST_P(Models, GiveTheLossAndGradientsOfOneRank) {
  const auto& [form, mesh] = GetParam();
  check(forms()[form], mesh.first, mesh.second, DType::f64, false);
  check(forms()[form], mesh.first, mesh.second, DType::f32, false);
  check(forms()[form], mesh.first, mesh.second, DType::f64, true);
}

const std::vector<std::pair<int, int>> meshes{{2, 1}, {3, 1}, {4, 1}, {1, 2}, {1, 3}, {1, 4}, {2, 2}};

std::string case_name(const testing::TestParamInfo<Models::ParamType>& info) {
  const auto& [form, mesh] = info.param;
  return forms()[form].name + "_tensor" + std::to_string(mesh.first) + "_context" + std::to_string(mesh.second);
}

INSTANTIATE_TEST_SUITE_P(Forms, Models, testing::Combine(testing::Range<std::size_t>(0, 4), testing::ValuesIn(meshes)),
                         case_name);

}  // namespace
}  // namespace capstan::parallel_test
