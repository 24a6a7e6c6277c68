// The forms that the GPT plugin covers: names, shapes and axes of their parameters, the published sizes, and what is
// refused.
#include "tests/plugins/models/fixture.h"

#include <cmath>
#include <functional>
#include <set>

namespace capstan::test {
namespace {

class GptForms : public GptFixture {
 protected:
  static std::vector<std::string> listing(const Model& model) {
    std::vector<std::string> lines;
    for (const Parameter* p : model.parameters()) lines.push_back(p->name() + " " + to_string(p->shape()));
    return lines;
  }
  static std::int64_t count(const Model& model) {
    std::int64_t n = 0;
    for (const Parameter* p : model.parameters()) n += p->numel();
    return n;
  }
  std::string refusal(const Overrides& options) {
    try {
      make(options);
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "no error";
    return "";
  }
};

const Overrides tiny{{"layers", "1"}, {"width", "8"}, {"heads", "2"}, {"context", "16"}, {"vocabulary", "11"}};

/// The same without what is said of a pattern's layers.
const Overrides patterned{{"layers", "1"}, {"width", "8"}, {"context", "16"}, {"vocabulary", "11"}};

TEST_F(GptForms, Gpt2Parameters) {
  EXPECT_EQ(
      listing(*make(tiny + gpt2_form)),
      (std::vector<std::string>{
          "tokens.weight [11, 8]", "positions.weight [16, 8]", "layers.0.attention.norm.weight [8]",
          "layers.0.attention.norm.bias [8]", "layers.0.attention.qkv.weight [24, 8]", "layers.0.attention.qkv.bias [24]",
          "layers.0.attention.out.weight [8, 8]", "layers.0.attention.out.bias [8]", "layers.0.mlp.norm.weight [8]",
          "layers.0.mlp.norm.bias [8]", "layers.0.mlp.up.weight [32, 8]", "layers.0.mlp.up.bias [32]",
          "layers.0.mlp.down.weight [8, 32]", "layers.0.mlp.down.bias [8]", "norm.weight [8]", "norm.bias [8]"}));
}

TEST_F(GptForms, LlamaParameters) {
  EXPECT_EQ(listing(*make(tiny + llama_form + Overrides{{"kv_heads", "1"}, {"ffn", "20"}})),
            (std::vector<std::string>{"tokens.weight [11, 8]", "layers.0.attention.norm.weight [8]",
                                      "layers.0.attention.qkv.weight [16, 8]", "layers.0.attention.out.weight [8, 8]",
                                      "layers.0.mlp.norm.weight [8]", "layers.0.mlp.gate_up.weight [40, 8]",
                                      "layers.0.mlp.down.weight [8, 20]", "norm.weight [8]", "head.weight [11, 8]"}));
}

TEST_F(GptForms, QwenParameters) {
  EXPECT_EQ(listing(*make(tiny + qwen_form + Overrides{{"kv_heads", "1"}, {"head_size", "6"}})),
            (std::vector<std::string>{"tokens.weight [11, 8]", "layers.0.attention.norm.weight [8]",
                                      "layers.0.attention.qkv.weight [24, 8]", "layers.0.attention.q_norm.weight [6]",
                                      "layers.0.attention.k_norm.weight [6]", "layers.0.attention.out.weight [8, 12]",
                                      "layers.0.mlp.norm.weight [8]", "layers.0.mlp.gate_up.weight [128, 8]",
                                      "layers.0.mlp.down.weight [8, 64]", "norm.weight [8]"}));
}

TEST_F(GptForms, PublishedSizes) {
  // GPT-2 small (Radford et al. 2019); Llama 3.2 1B, Llama 2 7B and Qwen3 0.6B as their checkpoints have them.
  EXPECT_EQ(
      count(*make(
          gpt2_form +
          Overrides{{"layers", "12"}, {"width", "768"}, {"heads", "12"}, {"context", "1024"}, {"vocabulary", "50257"}})),
      124439808);
  EXPECT_EQ(count(*make(llama_form + Overrides{{"layers", "16"},
                                               {"width", "2048"},
                                               {"heads", "32"},
                                               {"kv_heads", "8"},
                                               {"ffn", "8192"},
                                               {"vocabulary", "128256"},
                                               {"tied", "true"}})),
            1235814400);
  EXPECT_EQ(count(*make(
                llama_form +
                Overrides{{"layers", "32"}, {"width", "4096"}, {"heads", "32"}, {"ffn", "11008"}, {"vocabulary", "32000"}})),
            6738415616);
  EXPECT_EQ(count(*make(qwen_form + Overrides{{"layers", "28"},
                                              {"width", "1024"},
                                              {"heads", "16"},
                                              {"kv_heads", "8"},
                                              {"head_size", "128"},
                                              {"ffn", "3072"},
                                              {"vocabulary", "151936"}})),
            596049920);
}

TEST_F(GptForms, EveryDimensionHasItsAxes) {
  const auto model = make(tiny + gpt2_form + Overrides{{"kv_heads", "1"}, {"tied", "false"}});
  std::map<std::string, std::string> axes;
  for (const Parameter* p : model->parameters()) {
    std::string& text = axes[p->name()];
    for (const auto& dim : p->spec().dims) {
      text += text.empty() ? "" : " x ";
      for (std::size_t i = 0; i < dim.size(); ++i) {
        text += (i ? "," : "") + dim[i].axis + (dim[i].part.empty() ? "" : ":" + dim[i].part) + "=" +
                std::to_string(dim[i].count) + "*" + std::to_string(dim[i].width);
      }
    }
  }
  EXPECT_EQ(axes["tokens.weight"], "vocab=11*1 x hidden=8*1");
  EXPECT_EQ(axes["positions.weight"], "positions=16*1 x hidden=8*1");
  EXPECT_EQ(axes["head.weight"], "vocab=11*1 x hidden=8*1");
  EXPECT_EQ(axes["layers.0.attention.qkv.weight"], "heads:q=2*4,kv_heads:k=1*4,kv_heads:v=1*4 x hidden=8*1");
  EXPECT_EQ(axes["layers.0.attention.qkv.bias"], "heads:q=2*4,kv_heads:k=1*4,kv_heads:v=1*4");
  EXPECT_EQ(axes["layers.0.attention.out.weight"], "hidden=8*1 x heads=2*4");
  EXPECT_EQ(axes["layers.0.attention.out.bias"], "hidden=8*1");
  EXPECT_EQ(axes["layers.0.mlp.up.weight"], "mlp=32*1 x hidden=8*1");
  EXPECT_EQ(axes["layers.0.mlp.down.weight"], "hidden=8*1 x mlp=32*1");
  EXPECT_EQ(axes["norm.weight"], "hidden=8*1");
}

TEST_F(GptForms, InitialSpread) {
  const auto device = make_cpu_device(1);
  const auto model = make(
      llama_form + Overrides{{"layers", "8"}, {"width", "64"}, {"heads", "2"}, {"vocabulary", "300"}, {"init_std", "0.5"}});
  place(*model, *device, DType::f32);
  for (const Parameter* p : model->parameters()) {
    const std::vector<double> v = values(p->local());
    double mean = 0, square = 0;
    for (const double x : v) mean += x / static_cast<double>(v.size()), square += x * x / static_cast<double>(v.size());
    if (p->role() == Role::vector) {
      EXPECT_EQ(mean, 1) << p->name();
      continue;
    }
    const bool residual = p->name().ends_with("out.weight") || p->name().ends_with("down.weight");
    // Projections back into the stream: 0.5 / sqrt(2 * 8).
    EXPECT_NEAR(std::sqrt(square - mean * mean), residual ? 0.125 : 0.5, residual ? 0.01 : 0.04) << p->name();
  }
}

TEST_F(GptForms, CallsAreTheEmbeddingOneForEachLayerAndTheHead) {
  const auto model = make(tiny + llama_form + Overrides{{"layers", "3"}});
  std::vector<std::string> names;
  for (const Call& call : model->calls()) names.push_back(call.block->name());
  EXPECT_EQ(names, (std::vector<std::string>{"embedding", "layers.0", "layers.1", "layers.2", "head"}));
  EXPECT_EQ(model->vocabulary(), 11);
  EXPECT_EQ(model->hidden(), 8);
  EXPECT_EQ(model->longest(), 16);
  EXPECT_EQ(model->head().vocabulary(), 11);
  EXPECT_THROW(model->head("value"), Error);
  EXPECT_THAT(model->describe(), testing::HasSubstr("GPT, 3 layers, 2 heads"));
  std::vector<std::string> states;
  for (const StateSpec& s : model->state()) states.push_back(s.name + " " + to_string(s.shape));
  EXPECT_EQ(states, (std::vector<std::string>{"layers.0.attention [2, 4]", "layers.1.attention [2, 4]",
                                              "layers.2.attention [2, 4]"}));
}

TEST_F(GptForms, APatternNamesTheLayers) {
  const auto model =
      make(patterned + Overrides{{"pattern", "[mlp, {plugin: attention, heads: 4}, {plugin: mlp, ffn: 5, activation: gelu}]"}});
  std::set<std::string> names;
  for (const Parameter* p : model->parameters()) names.insert(p->name() + " " + to_string(p->shape()));
  EXPECT_THAT(names, testing::IsSupersetOf({"layers.0.mlp.gate_up.weight [128, 8]", "layers.0.attention.qkv.weight [24, 8]",
                                            "layers.0.mlp2.up.weight [5, 8]"}));
  EXPECT_THAT(model->describe(), testing::HasSubstr("mlp + attention + mlp2"));
}

TEST_F(GptForms, WhatAPatternsLayersSayIsRefusedBesideIt) {
  using testing::AllOf;
  using testing::HasSubstr;
  const Overrides given{{"pattern", "[{plugin: attention, heads: 2}, mlp]"}};
  for (const auto& [name, value] : Overrides{{"heads", "2"},
                                             {"kv_heads", "1"},
                                             {"head_size", "4"},
                                             {"ffn", "20"},
                                             {"activation", "gelu"},
                                             {"rope_theta", "500"},
                                             {"qk_norm", "true"},
                                             {"window", "4"},
                                             {"global_every", "2"}}) {
    EXPECT_THAT(refusal(patterned + given + Overrides{{name, value}}),
                AllOf(HasSubstr("model gpt:1, " + name + "]"), HasSubstr("give " + name + " to the layers")));
  }
  // A run's own recipe.yaml holds every default, and the table of learned positions is the model's.
  make(patterned + given +
       Overrides{{"heads", "6"}, {"kv_heads", "0"}, {"head_size", "0"}, {"ffn", "0"}, {"activation", "swiglu"}, {"rope_theta", "10000"},
                 {"qk_norm", "false"}, {"window", "0"}, {"global_every", "0"}});
  make(patterned + given + Overrides{{"positions", "learned"}});
}

// What a layer's attention costs on the meta device tells which window it has.
TEST_F(GptForms, WindowsAreThoseOfTheLayersAskedFor) {
  const auto pairs_by_layer = [&](const Overrides& windows) {
    const auto model = make(tiny + llama_form + Overrides{{"layers", "6"}} + windows);
    const auto device = make_meta_device();
    place(*model, *device, DType::f32);
    const std::vector<std::int32_t> lengths{16};
    const Batch batch = make_batch(*device, tokens(16, 11), lengths);
    ForwardContext context(batch, *device, DType::f32);
    context.set("h", Tensor::empty({16, 8}, DType::f32, *device));
    std::vector<double> pairs;
    for (const Call& call : model->calls()) {
      if (call.reads.empty() || call.writes.empty()) continue;
      device->clear_ledger();
      device->record(true);
      call.block->forward(context);
      for (const OpRecord& op : device->ledger())
        if (op.name == "attention") pairs.push_back(op.cost.flop / (4 * 8));
    }
    return pairs;
  };
  const double all = 16 * 17 / 2, four = 4 * 5 / 2 + 12 * 4;
  EXPECT_EQ(pairs_by_layer({}), std::vector<double>(6, all));
  EXPECT_EQ(pairs_by_layer({{"window", "4"}}), std::vector<double>(6, four));
  EXPECT_EQ(pairs_by_layer({{"window", "4"}, {"global_every", "3"}}), (std::vector<double>{four, four, all, four, four, all}));
  EXPECT_EQ(pairs_by_layer({{"heads", "6"}, {"pattern", "[{plugin: attention, heads: 2, window: 4, global_every: 2}]"}}),
            (std::vector<double>{four, all, four, all, four, all}));
  EXPECT_THAT(make(tiny + Overrides{{"window", "4"}, {"global_every", "2"}})->describe(),
              testing::HasSubstr("window 4 but in every 2nd layer"));
}

TEST_F(GptForms, WhatDoesNotFitIsRefusedByItsKey) {
  using testing::AllOf;
  using testing::HasSubstr;
  EXPECT_THAT(refusal(tiny + Overrides{{"vocabulary", "0"}}), AllOf(HasSubstr("vocabulary"), HasSubstr("tokenizer")));
  EXPECT_THAT(refusal(tiny + Overrides{{"heads", "3"}}),
              AllOf(HasSubstr("heads"), HasSubstr("divisor of width (8)"), HasSubstr("got 3")));
  EXPECT_THAT(refusal(tiny + Overrides{{"kv_heads", "3"}}), AllOf(HasSubstr("kv_heads"), HasSubstr("got 3")));
  EXPECT_THAT(refusal(tiny + Overrides{{"head_size", "3"}}), AllOf(HasSubstr("model gpt:1, head_size]"), HasSubstr("an even head size, got 3")));
  EXPECT_THAT(refusal(tiny + Overrides{{"heads", "8"}}),
              AllOf(HasSubstr("model gpt:1, heads]"), HasSubstr("an even head size, got 1 (width 8 / heads 8)")));
  make(tiny + Overrides{{"head_size", "3"}, {"positions", "learned"}});
  EXPECT_THAT(refusal(patterned + Overrides{{"pattern", "[{plugin: attention, heads: 2, head_size: 3}]"}}),
              AllOf(HasSubstr("rope"), HasSubstr("even head size, got 3")));
  EXPECT_THAT(refusal(patterned + Overrides{{"pattern", "[{plugin: attention, heads: 3}]"}}),
              AllOf(HasSubstr("heads"), HasSubstr("divisor of 8")));
  EXPECT_THAT(refusal(tiny + Overrides{{"norm", "batch"}}), HasSubstr("norm"));
  EXPECT_THAT(refusal(tiny + Overrides{{"dropout", "1"}}), HasSubstr("dropout"));
  EXPECT_THAT(refusal(tiny + Overrides{{"layers", "0"}}), HasSubstr("layers"));
  EXPECT_THAT(refusal(tiny + Overrides{{"window", "-1"}}), HasSubstr("window"));
  EXPECT_THAT(refusal(tiny + Overrides{{"global_every", "2"}}), AllOf(HasSubstr("global_every"), HasSubstr("give window")));
}

}  // namespace
}  // namespace capstan::test
