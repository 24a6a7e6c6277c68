// The model plugin "gpt": a decoder-only transformer. By its options it is GPT-2 (Radford et al. 2019: LayerNorm,
// learned positions, GELU, biases, tied head) or Llama and Qwen (RMSNorm, rotary positions, grouped-query attention,
// SwiGLU, normalized queries and keys, sliding windows); by its pattern it holds layers that other plugins bring.
#include "head.h"

#include <cmath>
#include <cstdio>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace capstan {
namespace {

/// tokens (+ positions) -> h, with dropout.
class InputBlock : public Block {
 public:
  InputBlock(std::int64_t vocabulary, std::int64_t hidden, std::int64_t context, bool learned, double init_std,
             double dropout)
      : Block("embedding"), dropout_(dropout) {
    auto tokens = std::make_shared<nn::Embedding>("tokens", vocabulary, "vocab", hidden, init_std);
    tokens_ = tokens.get();
    adopt(std::move(tokens));
    if (learned) {
      auto positions = std::make_shared<nn::Embedding>("positions", context, "positions", hidden, init_std);
      positions_ = positions.get();
      adopt(std::move(positions));
    }
  }

  void forward(ForwardContext& context) override {
    const Space& space = context.batch.space();
    Tensor h = (*tokens_)(context, context.batch.stream("tokens"));
    if (positions_) h = ops::add(h, (*positions_)(context, space.positions));
    context.set("h", nn::dropout(context, h, dropout_, name() + "/dropout"));
  }

  Parameter& weight() const { return tokens_->weight(); }

 private:
  double dropout_;
  nn::Embedding *tokens_ = nullptr, *positions_ = nullptr;
};

/// One repetition of the pattern: the unit of recompute and of sharding.
class TransformerBlock : public Block {
 public:
  TransformerBlock(std::string name, std::vector<std::shared_ptr<Layer>> layers)
      : Block(std::move(name)), layers_(std::move(layers)) {
    for (const auto& layer : layers_) adopt(layer);
  }

  void forward(ForwardContext& context) override {
    Tensor h = context.get("h");
    for (const auto& layer : layers_) h = layer->apply(context, h);
    context.set("h", h);
  }

  std::vector<StateSpec> state() const override {
    std::vector<StateSpec> all;
    for (const auto& layer : layers_) {
      for (auto& spec : layer->state()) all.push_back(std::move(spec));
    }
    return all;
  }

 private:
  std::vector<std::shared_ptr<Layer>> layers_;
};

std::string yaml_number(double v) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", v);
  return text;
}

const char* yaml_flag(bool v) { return v ? "true" : "false"; }

/// Options of the attention and MLP that a model without a pattern has.
constexpr const char* layer_options[] = {"heads",      "kv_heads", "head_size", "ffn",         "activation",
                                         "rope_theta", "qk_norm",  "window",    "global_every"};

/// Whether an option is another than its default. One that was set to its default counts as left out: the recipe that a run
/// keeps writes all of them out.
bool is_set(const Options& o, const OptionSpec& spec) {
  switch (spec.type) {
    case OptionSpec::Type::flag:
      return yaml_flag(o.flag(spec.name)) != spec.default_text;
    case OptionSpec::Type::integer:
      return o.integer(spec.name) != std::stoll(spec.default_text);
    case OptionSpec::Type::number:
      return o.number(spec.name) != std::stod(spec.default_text);
    default:
      return o.text(spec.name) != spec.default_text;
  }
}

/// A pattern entry's name within its block: the plugin's own, without the folder, kind and ending of a path.
std::string leaf_name(std::string name) {
  if (const auto slash = name.rfind('/'); slash != std::string::npos) name.erase(0, slash + 1);
  if (const auto dot = name.find('.'); dot != std::string::npos) name.erase(dot);
  if (name.rfind("layer_", 0) == 0) name.erase(0, 6);
  return name;
}

class Gpt : public Model {
 public:
  Gpt(const Options& o, Registrar& registrar, const Schema& schema)
      : vocabulary_(o.integer("vocabulary")), hidden_(o.integer("width")), longest_(o.integer("context")) {
    if (vocabulary_ == 0) {
      o.refuse("vocabulary", "0 stands for the tokenizer's vocabulary, but no tokenizer has set it; give a number");
    }
    const std::int64_t layers = o.integer("layers");
    const double init_std = o.number("init_std"), epsilon = o.number("norm_epsilon"), dropout = o.number("dropout");
    const std::string& norm = o.text("norm");
    const bool bias = o.flag("bias");
    const std::vector<PluginChoice> pattern = pattern_of(o, registrar, schema);
    std::vector<std::shared_ptr<LayerMaker>> makers;
    std::vector<std::string> names;
    std::set<std::string> taken;
    for (const PluginChoice& choice : pattern) {
      makers.push_back(registrar.make_as<LayerMaker>(choice));
      const std::string name = leaf_name(choice.name);
      std::string unique = name;
      for (int n = 2; !taken.insert(unique).second; ++n) unique = name + std::to_string(n);
      names.push_back(unique);
    }

    input_ =
        std::make_shared<InputBlock>(vocabulary_, hidden_, longest_, o.text("positions") == "learned", init_std, dropout);
    calls_.push_back({input_.get(), {}, {"h"}});
    LayerContext c;
    c.hidden = hidden_;
    c.layers = layers;
    c.init_std = init_std;
    // Each layer adds to the residual stream once: its variance stays that of one (Radford et al. 2019).
    c.residual_init_std = init_std / std::sqrt(static_cast<double>(layers) * static_cast<double>(pattern.size()));
    c.norm = norm;
    c.norm_epsilon = epsilon;
    c.bias = bias;
    c.dropout = dropout;
    c.longest = longest_;
    for (std::int64_t i = 0; i < layers; ++i) {
      const std::string name = "layers." + std::to_string(i);
      c.index = i;
      std::vector<std::shared_ptr<Layer>> made;
      for (std::size_t p = 0; p < makers.size(); ++p) {
        c.name = name + "." + names[p];
        made.push_back(makers[p]->make(c));
      }
      blocks_.push_back(std::make_shared<TransformerBlock>(name, std::move(made)));
      calls_.push_back({blocks_.back().get(), {"h"}, {"h"}});
    }
    Parameter* tied = o.flag("tied") ? &input_->weight() : nullptr;
    head_ = std::make_shared<LmHead>(norm, hidden_, epsilon, bias, vocabulary_, init_std, tied);
    calls_.push_back({head_.get(), {"h"}, {}});

    description_ = "GPT, " + std::to_string(layers) + (layers == 1 ? " layer, " : " layers, ");
    if (o.plugins("pattern").empty()) {
      description_ += std::to_string(o.integer("heads")) + " heads";
      if (o.integer("kv_heads") != 0) description_ += " (" + std::to_string(o.integer("kv_heads")) + " of keys and values)";
      if (const std::int64_t every = o.integer("global_every"); o.integer("window") != 0) {
        description_ += ", window " + std::to_string(o.integer("window"));
        if (every != 0) description_ += " but in every " + std::to_string(every) + (every == 2 ? "nd" : every == 3 ? "rd" : "th") + " layer";
      }
    } else {
      for (std::size_t p = 0; p < names.size(); ++p) description_ += (p ? " + " : "") + names[p];
    }
    description_ += ", width " + std::to_string(hidden_) + ", context " + std::to_string(longest_);
  }

  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view name) override {
    if (name != "lm") fail(Fault::programming, "gpt", "no head of that name: expected lm, got " + std::string(name));
    return *head_;
  }
  std::int64_t vocabulary() const override { return vocabulary_; }
  std::int64_t hidden() const override { return hidden_; }
  std::int64_t longest() const override { return longest_; }
  std::string describe() const override { return description_; }

 private:
  /// What the recipe names, or attention and MLP as the model's own options describe them.
  static std::vector<PluginChoice> pattern_of(const Options& o, Registrar& registrar, const Schema& schema) {
    if (!o.plugins("pattern").empty()) {
      for (const char* name : layer_options) {
        if (is_set(o, *schema.find(name))) {
          o.refuse(name, std::string("model.pattern says what each layer is: give ") + name + " to the layers in it, not beside it");
        }
      }
      return o.plugins("pattern");
    }
    using Overrides = std::vector<std::pair<std::string, std::string>>;
    const std::int64_t heads = o.integer("heads"), kv_heads = o.integer("kv_heads"), head_size = o.integer("head_size");
    // Checked here too, so that the message names the key that the person wrote.
    if (kv_heads != 0 && heads % kv_heads != 0) {
      o.refuse("kv_heads", "expected a divisor of heads (" + std::to_string(heads) + "), got " + std::to_string(kv_heads));
    }
    if (head_size == 0 && o.integer("width") % heads != 0) {
      o.refuse("heads", "expected a divisor of width (" + std::to_string(o.integer("width")) + "), got " +
                            std::to_string(heads) + "; or give head_size");
    }
    if (const std::int64_t size = head_size != 0 ? head_size : o.integer("width") / heads; o.text("positions") == "rope" && size % 2 != 0) {
      o.refuse(head_size != 0 ? "head_size" : "heads",
               "rotary positions turn pairs of elements: expected an even head size, got " + std::to_string(size) +
                   (head_size != 0 ? "" : " (width " + std::to_string(o.integer("width")) + " / heads " + std::to_string(heads) + ")") +
                   "; or choose positions=learned");
    }
    if (o.integer("global_every") != 0 && o.integer("window") == 0) {
      o.refuse("global_every", "without a window every layer is global: give window too, or leave this out");
    }
    const Overrides attention{{"heads", std::to_string(heads)},
                              {"kv_heads", std::to_string(kv_heads)},
                              {"head_size", std::to_string(head_size)},
                              {"rope", yaml_flag(o.text("positions") == "rope")},
                              {"rope_theta", yaml_number(o.number("rope_theta"))},
                              {"qk_norm", yaml_flag(o.flag("qk_norm"))},
                              {"window", std::to_string(o.integer("window"))},
                              {"global_every", std::to_string(o.integer("global_every"))}};
    const Overrides mlp{{"activation", o.text("activation")}, {"ffn", std::to_string(o.integer("ffn"))}};
    return {registrar.choice("layer", "attention", attention), registrar.choice("layer", "mlp", mlp)};
  }

  std::int64_t vocabulary_, hidden_, longest_;
  std::shared_ptr<InputBlock> input_;
  std::vector<std::shared_ptr<TransformerBlock>> blocks_;
  std::shared_ptr<LmHead> head_;
  std::vector<Call> calls_;
  std::string description_;
};

}  // namespace
}  // namespace capstan

CAPSTAN_PLUGIN("model", "gpt", "1.0.0") {
  capstan::Schema schema;
  schema.integer("layers", 6, "how often the pattern repeats").range(1, 1 << 14);
  schema.integer("width", 384, "width of the residual stream").range(1, 1 << 20);
  schema.integer("context", 256, "longest sequence").range(1, 1 << 24).in("tokens");
  schema.integer("vocabulary", 0, "rows of the token table; 0: the tokenizer's").range(0, 1 << 26).in("tokens");
  schema.integer("heads", 6, "query heads").range(1, 1 << 16);
  schema.integer("kv_heads", 0, "key/value heads, a divisor of heads; 0: as many as heads").range(0, 1 << 16);
  schema.integer("head_size", 0, "elements of one head; 0: width / heads").range(0, 1 << 16);
  schema.integer("ffn", 0, "inner width of the MLP; 0: 4 * width for gelu, 8/3 * width up to a multiple of 64 for swiglu")
      .range(0, 1 << 22);
  schema.text("activation", "swiglu", "of the MLP").one_of({"swiglu", "gelu"});
  schema.text("norm", "rms", "RMSNorm or LayerNorm").one_of({"rms", "layer"});
  schema.number("norm_epsilon", 1e-5, "added under the norm's square root").above(0);
  schema.text("positions", "rope", "rotary, or a learned table").one_of({"rope", "learned"});
  schema.number("rope_theta", 10000, "base of the rotation's wavelengths").above(0);
  schema.flag("qk_norm", false, "normalize each head's query and key");
  schema.integer("window", 0, "sliding window: keys that a token sees, its own and those just before it; 0: all before it")
      .at_least(0)
      .in("tokens");
  schema.integer("global_every", 0, "every n-th layer (n, 2 n, ... counted from 1) has no window; 0: all layers have it")
      .at_least(0);
  schema.flag("bias", false, "biases in projections and in LayerNorm");
  schema.flag("tied", true, "the head uses the token table");
  schema.number("dropout", 0, "of the embedding and of each layer's output").range(0, 0.99);
  schema.number("init_std", 0.02, "standard deviation of the initial weights; over sqrt(layers * pattern) into the residual")
      .above(0);
  schema.plugins("layer", "pattern", "what one layer consists of, in order; absent: attention and mlp by the options above, which go into "
                          "the layers of a pattern instead");
  registrar.add("model", "gpt", schema, [schema](const capstan::Options& o, capstan::Registrar& r) {
    return capstan::as_interface<capstan::Model>(std::make_shared<capstan::Gpt>(o, r, schema));
  });
}
