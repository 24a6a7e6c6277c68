// Fifty AdamW steps against PyTorch: same initial values, same batches, losses within 1e-4 relative in f32
// (tests/reference/gpt_reference.py made the numbers and says what they are).
#include "engine/engine.h"
#include "tests/plugins/models/fixture.h"

#include <nlohmann/json.hpp>
#include <support/tolerance.h>

#include <fstream>

namespace capstan::test {
namespace {

class Reference : public GptFixture, public testing::WithParamInterface<const char*> {
 protected:
  nlohmann::json reference = [this] {
    std::ifstream file(std::string(CAPSTAN_SOURCE_DIR) + "/tests/reference/" + GetParam() + ".json");
    return nlohmann::json::parse(file);
  }();
  nlohmann::json config = reference["config"];

  std::string text(const char* key) const { return config[key].dump(); }
  std::int64_t integer(const char* key) const { return config[key].get<std::int64_t>(); }

  std::unique_ptr<Engine> engine() {
    Overrides form = config["form"] == "gpt2" ? gpt2_form : llama_form;
    if (config.contains("window")) form = form + Overrides{{"window", text("window")}, {"global_every", text("global_every")}};
    auto e = std::make_unique<Engine>(make(form + Overrides{{"layers", text("layers")},
                                                            {"heads", text("heads")},
                                                            {"kv_heads", text("kv_heads")},
                                                            {"width", text("hidden")},
                                                            {"ffn", text("ffn")},
                                                            {"context", text("context")},
                                                            {"vocabulary", text("vocabulary")},
                                                            {"norm_epsilon", text("norm_epsilon")},
                                                            {"init_std", text("init_std")}}),
                                      make_cpu_device(2),
                                      EngineOptions{.seed = config["seed"].get<std::uint64_t>()});
    e->initialize();
    return e;
  }

  /// Batch number n: sequences of context + 1 tokens; inputs are the first of them, targets the last.
  Batch batch(std::int64_t n, Device& device, std::vector<std::int32_t>* all = nullptr) const {
    const Rng rng(7, "reference/tokens", static_cast<std::uint64_t>(n));
    const std::int64_t context = integer("context"), sequences = integer("batch");
    std::vector<std::int32_t> inputs, targets,
        lengths(static_cast<std::size_t>(sequences), static_cast<std::int32_t>(context));
    std::uint64_t at = 0;
    for (std::int64_t s = 0; s < sequences; ++s) {
      for (std::int64_t i = 0; i <= context; ++i, ++at) {
        const auto token = static_cast<std::int32_t>(rng.below(at, config["vocabulary"].get<std::uint64_t>()));
        if (i < context) inputs.push_back(token);
        if (i > 0) targets.push_back(token);
      }
    }
    if (all) *all = inputs;
    return make_batch(device, inputs, lengths, targets);
  }
};

TEST_P(Reference, InitialValuesAndTokensAreTheSame) {
  const auto e = engine();
  std::map<std::string, Tensor> tensors;
  for (const NamedTensor& t : e->tensors(false)) tensors[t.name] = t.value;
  EXPECT_EQ(tensors.size(), reference["first_values"].size());
  for (const auto& [name, expected] : reference["first_values"].items()) {
    ASSERT_TRUE(tensors.contains("model/" + name)) << name;
    const std::vector<double> got = values(tensors.at("model/" + name));
    // Normals are computed in f64 on both sides, by other libraries' logarithms: the last bit of an f32 may differ.
    for (std::size_t i = 0; i < expected.size(); ++i)
      EXPECT_NEAR(got[i], expected[i].get<double>(), 1e-8) << name << "[" << i << "]";
  }
  std::vector<std::int32_t> tokens;
  batch(0, e->device(), &tokens);
  for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(tokens[i], reference["first_tokens"][i].get<std::int32_t>());
}

TEST_P(Reference, FiftyStepsOfLossAgree) {
  const auto e = engine();
  const std::vector<std::pair<std::string, std::string>> options{{"lr", text("lr")},
                                                                 {"beta1", text("beta1")},
                                                                 {"beta2", text("beta2")},
                                                                 {"epsilon", text("epsilon")},
                                                                 {"weight_decay", text("weight_decay")}};
  e->attach(host.make_as<Optimizer>(host.choice("optimizer", "adamw", options)));
  ASSERT_EQ(reference["losses"].size(), 50u);
  double last = 0;
  for (std::int64_t step = 0; step < 50; ++step) {
    const Batch b = batch(step % integer("batches"), e->device());
    const std::vector<LossEntry> losses = e->forward_backward(b, static_cast<std::uint64_t>(step));
    ASSERT_EQ(losses.size(), 1u);
    last = losses[0].sum.item();
    const double expected = reference["losses"][static_cast<std::size_t>(step)].get<double>();
    EXPECT_NEAR(last, expected, bounds::curve(DType::f32) * expected) << "step " << step;
    e->update(step + 1, 1, e->gradient_norm(), 0);
  }
  EXPECT_LT(last, 0.6 * reference["losses"][0].get<double>()) << "the model has learned, so the comparison says something";
}

INSTANTIATE_TEST_SUITE_P(Forms, Reference, testing::Values("gpt2", "llama", "window"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace capstan::test
