// A language model as small as one can be: logits of the next token are head * table[token], a bigram table of low rank.
#include <capstan/nn.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace capstan;

class Table : public Block {
 public:
  Table(std::int64_t vocabulary, std::int64_t width)
      : Block("table"), rows_(child<nn::Embedding>("tokens", vocabulary, "vocab", width, 0.5)) {}
  void forward(ForwardContext& context) override { context.set("h", rows_(context, context.batch.stream("tokens"))); }

 private:
  nn::Embedding& rows_;
};

class TableHead : public Head {
 public:
  TableHead(std::int64_t vocabulary, std::int64_t width) : Head("head"), vocabulary_(vocabulary) {
    ParameterSpec spec;
    spec.dims = {{{"vocab", vocabulary, 1, ""}}, {{"hidden", width, 1, ""}}};
    spec.role = Role::head;
    spec.init = {Init::Kind::normal, 0.02};
    weight_ = &declare("weight", spec);
  }
  Score score(ForwardContext& context, const Tensor& targets, const Tensor* weights, Tensor* objective) override {
    const ops::HeadScore s = ops::linear_cross_entropy(context.get("h"), weight(context), targets, weights, context.grad);
    if (objective) *objective = s.objective;
    return {s.logprob, s.logsumexp, s.entropy};
  }
  Tensor logits(ForwardContext& context, const Tensor& rows) override {
    const Tensor y = ops::linear(ops::gather(context.get("h"), rows), weight(context));
    return y.dtype() == DType::f64 ? y : ops::cast(y, DType::f32);
  }
  std::int64_t vocabulary() const override { return vocabulary_; }

 private:
  Tensor weight(const ForwardContext& context) const { return context.grad ? weight_->local() : weight_->local().detach(); }
  std::int64_t vocabulary_;
  Parameter* weight_ = nullptr;
};

class MyModel : public Model {
 public:
  MyModel(std::int64_t vocabulary, std::int64_t width)
      : width_(width),
        table_(vocabulary, width),
        head_(vocabulary, width),
        calls_{{&table_, {}, {"h"}}, {&head_, {"h"}, {}}} {}
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view) override { return head_; }
  std::int64_t vocabulary() const override { return head_.vocabulary(); }
  std::int64_t hidden() const override { return width_; }
  std::int64_t longest() const override { return 0; }
  std::string describe() const override { return "bigram table of rank " + std::to_string(width_); }

 private:
  std::int64_t width_;
  Table table_;
  TableHead head_;
  std::vector<Call> calls_;
};

}  // namespace

CAPSTAN_PLUGIN("model", "my_model", "0.0.1") {
  Schema schema;
  schema.integer("rank", 32, "width of the table's rows").at_least(1);
  schema.integer("vocabulary", 0, "tokens; 0: the tokenizer's").at_least(0);
  registrar.add("model", "my_model", schema, [](const Options& o, Registrar&) {
    return as_interface<Model>(std::make_shared<MyModel>(o.integer("vocabulary"), o.integer("rank")));
  });
}
