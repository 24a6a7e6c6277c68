// The model plugin "@name@": a start to write your own from. It predicts each token from the one before it alone
// (embedding, one gated layer, head), and so learns what a bigram table knows.
#include <capstan/nn.h>

#include <cstdint>
#include <string>
#include <vector>

namespace {
using namespace capstan;
constexpr double init_std = 0.02;

/// tokens i32 [T] -> h [T, width].
class @Name@Input : public Block {
 public:
  @Name@Input(std::int64_t vocabulary, std::int64_t width)
      : Block("embedding"), table_(child<nn::Embedding>("tokens", vocabulary, "vocab", width, init_std)) {}
  void forward(ForwardContext& context) override { context.set("h", table_(context, context.batch.stream("tokens"))); }
 private:
  nn::Embedding& table_;
};

/// h + down(swiglu(up(norm(h)))), all of it [T, width].
class @Name@Block : public Block {
 public:
  explicit @Name@Block(std::int64_t width)
      : Block("block"),
        norm_(child<nn::Norm>("norm", "rms", width, "hidden", 1e-5, false)),
        up_(child<nn::Linear>("up", std::vector<Segment>{{"mlp", 2 * width, 1, "gate"}, {"mlp", 2 * width, 1, "up"}},
                              std::vector<Segment>{{"hidden", width, 1, ""}}, false, init_std)),
        down_(child<nn::Linear>("down", std::vector<Segment>{{"hidden", width, 1, ""}},
                                std::vector<Segment>{{"mlp", 2 * width, 1, ""}}, false, init_std)) {}
  void forward(ForwardContext& context) override {
    const auto [h, in] = norm_.with_sum(context, context.get("h"));
    context.set("h", down_.add_to(context, ops::swiglu(up_(context, in)), h));
  }
 private:
  nn::Norm& norm_;
  nn::Linear &up_, &down_;
};

/// h [T, width] -> distributions over the next token.
class @Name@Head : public Head {
 public:
  @Name@Head(std::int64_t vocabulary, std::int64_t width)
      : Head("head"), vocabulary_(vocabulary), norm_(child<nn::Norm>("norm", "rms", width, "hidden", 1e-5, false)),
        weight_(declare("weight", {.dims = {{{"vocab", vocabulary, 1, ""}}, {{"hidden", width, 1, ""}}},
                                   .role = Role::head, .init = {Init::Kind::normal, init_std}})) {}
  Score score(ForwardContext& context, const Tensor& targets, const Tensor* weights, Tensor* objective) override {
    const ops::HeadScore s = ops::linear_cross_entropy(norm_(context, context.get("h")), weight(context), targets, weights,
                                                       context.grad);
    if (objective) *objective = s.objective;
    return {s.logprob, s.logsumexp, s.entropy};
  }
  Tensor logits(ForwardContext& context, const Tensor& rows) override {
    const Tensor y = ops::linear(norm_(context, ops::gather(context.get("h"), rows)), weight(context));
    return y.dtype() == DType::f64 ? y : ops::cast(y, DType::f32);
  }
  std::int64_t vocabulary() const override { return vocabulary_; }

 private:
  Tensor weight(const ForwardContext& c) const { return c.grad ? weight_.local() : weight_.local().detach(); }
  std::int64_t vocabulary_;
  nn::Norm& norm_;
  Parameter& weight_;
};

class @Name@ : public Model {
 public:
  explicit @Name@(const Options& o)
      : width_(o.integer("width")), longest_(o.integer("context")), input_(o.integer("vocabulary"), width_), block_(width_),
        head_(o.integer("vocabulary"), width_), calls_{{&input_, {}, {"h"}}, {&block_}, {&head_, {"h"}, {}}} {}
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view) override { return head_; }
  std::int64_t vocabulary() const override { return head_.vocabulary(); }
  std::int64_t hidden() const override { return width_; }
  std::int64_t longest() const override { return longest_; }
  std::string describe() const override { return "@name@, width " + std::to_string(width_); }

 private:
  std::int64_t width_, longest_;
  @Name@Input input_;
  @Name@Block block_;
  @Name@Head head_;
  std::vector<Call> calls_;
};

}  // namespace

CAPSTAN_PLUGIN("model", "@name@", "0.1.0") {
  Schema schema;
  schema.integer("width", 64, "width of the hidden state").at_least(1);
  schema.integer("context", 128, "longest sequence").in("tokens").at_least(1);
  schema.integer("vocabulary", 0, "rows of the token table; 0: the tokenizer's").in("tokens").at_least(0);
  registrar.add("model", "@name@", schema, [](const Options& o, Registrar&) {
    if (o.integer("vocabulary") == 0) o.refuse("vocabulary", "no tokenizer has set it; give a number");
    return as_interface<Model>(std::make_shared<@Name@>(o));
  });
}
