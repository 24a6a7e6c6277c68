// The engine: gradients of micro-batches, of tied and unused parameters, the norm, clipping, recomputation, and what a
// step takes on the meta device against the real one.
#include "core/engine/sessions.h"

#include <capstan/ops.h>

#include <gmock/gmock.h>
#include <support/tolerance.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace capstan::engine_test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

double largest(const std::vector<double>& v) {
  double m = 0;
  for (const double x : v) m = std::max(m, std::abs(x));
  return m;
}

/// |a - b| as a share of the largest |b|.
double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst / std::max(largest(b), 1e-300);
}

double run_step(Engine& engine, const std::vector<Batch>& batches, std::int64_t step, double clip = 1) {
  double loss = 0;
  for (const Batch& b : batches)
    for (const LossEntry& e : engine.forward_backward(b, static_cast<std::uint64_t>(step))) loss += e.weight * e.sum.item();
  engine.update(step, 1, engine.gradient_norm(), clip);
  return loss;
}

class Accumulation : public Sessions, public ::testing::WithParamInterface<std::string> {};

TEST_P(Accumulation, MicrobatchesGiveTheSameLossAndWeights) {
  const double tolerance = bounds::reordered(dtype_from(GetParam()));
  std::vector<double> losses, all;
  for (const std::int64_t micro : {4, 2, 1}) {
    auto s = open({"precision.compute=" + GetParam(), "model.dropout=0.1", "optimizer={plugin: sgd, lr: 0.1}"});
    const auto batches = step_batches(*s, 4, micro);
    ASSERT_EQ(batches.size(), static_cast<std::size_t>(4 / micro));
    std::vector<double> l, w;
    for (int step = 1; step <= 3; ++step) l.push_back(run_step(*s->engine, batches, step));
    for (const auto& [name, values] : parameters(*s->engine)) w.insert(w.end(), values.begin(), values.end());
    if (micro == 4) {
      losses = l, all = w;
      EXPECT_LT(l[2], l[0]);
      continue;
    }
    for (int i = 0; i < 3; ++i) EXPECT_NEAR(l[static_cast<std::size_t>(i)] / losses[static_cast<std::size_t>(i)], 1, tolerance) << micro;
    EXPECT_LT(difference(w, all), tolerance) << micro;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Accumulation, ::testing::Values("f32", "f64"), [](const auto& info) { return info.param; });

// The step's weight is that of all its tokens: microbatches of unequal weight count by their tokens, not by one each.
TEST_F(Sessions, UnequalMicrobatchesCountByTheirTokens) {
  auto whole = open({"precision.compute=f64"}), parts = open({"precision.compute=f64"});
  const double a = run_step(*whole->engine, {batch_of(*whole, 0, 4, 4)}, 1);
  const double b = run_step(*parts->engine, {batch_of(*parts, 0, 3, 4), batch_of(*parts, 3, 1, 4)}, 1);
  EXPECT_NEAR(a, b, 1e-12);
  EXPECT_NEAR(a, std::log(256), 0.1);  // a mean over tokens, whatever their number
}

class Recompute : public Sessions, public ::testing::WithParamInterface<std::string> {};

TEST_P(Recompute, GivesTheSameBits) {
  std::vector<std::vector<double>> losses;
  std::vector<Parameters> weights;
  std::vector<std::int64_t> peaks;
  for (const char* mode : {"none", "block"}) {
    auto s = open({"precision.compute=" + GetParam(), "model.dropout=0.2", "model.layers=4", std::string("train.recompute=") + mode});
    const auto batches = step_batches(*s, 4, 2);
    std::vector<double> l;
    s->device->reset_peak();
    for (int step = 1; step <= 3; ++step) l.push_back(run_step(*s->engine, batches, step));
    losses.push_back(l), weights.push_back(parameters(*s->engine)), peaks.push_back(s->device->bytes_peak());
  }
  EXPECT_EQ(losses[0], losses[1]);
  EXPECT_EQ(weights[0], weights[1]);
  EXPECT_LT(peaks[1], peaks[0]);
}

INSTANTIATE_TEST_SUITE_P(Types, Recompute, ::testing::Values("f32", "bf16"), [](const auto& info) { return info.param; });

// The gradient of a table that is also the head is the sum of what both uses give apart.
TEST_F(Sessions, TiedParametersCollectBothUses) {
  const std::vector<std::string> base{"precision.compute=f64", "model.dropout=0"};
  auto with = [&](const char* tied) {
    auto words = base;
    words.push_back(std::string("model.tied=") + tied);
    return open(words);
  };
  auto tied = with("true"), apart = with("false");
  Parameter *table = nullptr, *head = nullptr, *both = nullptr;
  for (Parameter* p : apart->model->parameters()) {
    if (p->name() == "tokens.weight") table = p;
    if (p->role() == Role::head) head = p;
  }
  for (Parameter* p : tied->model->parameters())
    if (p->name() == "tokens.weight") both = p;
  ASSERT_TRUE(table && head && both);
  EXPECT_EQ(tied->engine->parameters() + head->numel(), apart->engine->parameters());
  head->local().copy_from(table->local());  // in f64 the working copy is the master
  apart->engine->publish();

  int fired = 0;
  both->leaf()->hook = [&](Leaf&) { ++fired; };
  tied->engine->forward_backward(batch_of(*tied, 0, 4, 4), 1);
  apart->engine->forward_backward(batch_of(*apart, 0, 4, 4), 1);
  EXPECT_EQ(fired, 1) << "the hook waits for the last use";
  const auto a = values(table->leaf()->grad()), b = values(head->leaf()->grad()), sum = values(both->leaf()->grad());
  std::vector<double> expected(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) expected[i] = a[i] + b[i];
  EXPECT_LT(difference(sum, expected), 1e-12);
  EXPECT_GT(largest(a), 0);
  EXPECT_GT(largest(b), 0);
}

TEST_F(Sessions, EveryHookFiresOnceInAMicrobatch) {
  for (const char* mode : {"none", "block"}) {
    auto s = open({std::string("train.recompute=") + mode, "model.tied=false", "model.norm=layer", "model.positions=learned", "model.bias=true"});
    std::map<std::string, int> fired;
    for (Parameter* p : s->model->parameters()) p->leaf()->hook = [&fired, p](Leaf&) { ++fired[p->name()]; };
    s->engine->forward_backward(batch_of(*s, 0, 2, 2), 1);
    EXPECT_EQ(fired.size(), s->model->parameters().size());
    for (const auto& [name, n] : fired) EXPECT_EQ(n, 1) << name;
  }
}

// The head's use comes back first, the table's only when its call is run again.
TEST_F(Sessions, TheHookOfATiedTableWaitsForTheCallThatIsRunAgain) {
  for (const char* mode : {"none", "block"}) {
    SCOPED_TRACE(mode);
    auto s = open({std::string("train.recompute=") + mode, "precision.compute=f64", "model.tied=true", "model.norm=layer", "model.positions=learned", "model.bias=true"});
    std::map<std::string, int> fired;
    std::map<std::string, std::vector<double>> seen;
    for (Parameter* p : s->model->parameters())
      p->leaf()->hook = [&fired, &seen, p](Leaf& leaf) { ++fired[p->name()], seen[p->name()] = values(leaf.grad()); };
    for (int microbatch = 1; microbatch <= 2; ++microbatch) {
      s->engine->forward_backward(batch_of(*s, 0, 2, 2), 1);
      for (Parameter* p : s->model->parameters()) {
        EXPECT_EQ(fired[p->name()], microbatch) << p->name();
        EXPECT_EQ(seen[p->name()], values(p->leaf()->grad())) << p->name() << ": the hook fired before the gradient was whole";
        EXPECT_EQ(p->leaf()->uses(), 0) << p->name();
      }
    }
  }
}

/// Two vectors, of which a step uses the second only when it is asked to.
class Choosy : public Head {
 public:
  Choosy() : Head("choosy") {
    ParameterSpec spec;
    spec.dims = {{{"hidden", 5, 1, ""}}};
    spec.init = {Init::Kind::normal, 1};
    always = &declare("always", spec);
    sometimes = &declare("sometimes", spec);
    spec.trainable = false;
    fixed = &declare("fixed", spec);
  }
  void forward(ForwardContext& c) override {
    Tensor y = ops::mul(c.use(*always), c.use(*fixed));
    if (c.step % 2 == 1) y = ops::add(y, ops::mul(c.use(*sometimes), c.use(*sometimes)));
    c.loss("test", ops::sum_all(y), 1);
  }
  Score score(ForwardContext&, const Tensor&, const Tensor*, Tensor*) override { return {}; }
  Tensor logits(ForwardContext&, const Tensor&) override { return {}; }
  std::int64_t vocabulary() const override { return 1; }
  Parameter *always, *sometimes, *fixed;
};

class ChoosyModel : public Model {
 public:
  explicit ChoosyModel(bool recompute = false) { calls_[0].recompute = recompute; }
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view) override { return head_; }
  std::int64_t vocabulary() const override { return 1; }
  std::int64_t hidden() const override { return 5; }
  std::int64_t longest() const override { return 0; }
  std::string describe() const override { return "choosy"; }

 private:
  Choosy head_;
  std::vector<Call> calls_{{&head_, {}, {}}};
};

TEST_F(Sessions, TheHookOfAnUnusedParameterIsSilent) {
  auto s = open({});
  for (const bool recompute : {false, true}) {
    auto model = std::make_shared<ChoosyModel>(recompute);
    auto& head = static_cast<Choosy&>(model->head(""));
    Engine engine(model, s->device, {});
    engine.initialize();
    const std::vector<std::int32_t> tokens{0}, lengths{1};
    const Batch batch = make_batch(*s->device, tokens, lengths);
    int always = 0, sometimes = 0;
    head.always->leaf()->hook = [&](Leaf&) { ++always; };
    head.sometimes->leaf()->hook = [&](Leaf&) { ++sometimes; };
    for (std::uint64_t step = 2; step <= 4; ++step) engine.forward_backward(batch, step);
    EXPECT_EQ(always, 3) << recompute;
    EXPECT_EQ(sometimes, 1) << recompute;
    EXPECT_EQ(head.sometimes->leaf()->uses(), 0) << recompute;
  }
}

TEST_F(Sessions, UnusedParametersHaveAZeroGradient) {
  auto s = open({"optimizer={plugin: sgd, lr: 0.5, momentum: 0}"});
  auto model = std::make_shared<ChoosyModel>();
  auto& head = static_cast<Choosy&>(model->head(""));
  Engine engine(model, s->device, {});
  engine.initialize();
  engine.attach(s->host->make_as<Optimizer>(s->options().plugin("optimizer")));
  const std::vector<std::int32_t> tokens{0}, lengths{1};
  const Batch batch = make_batch(*s->device, tokens, lengths);

  engine.forward_backward(batch, 1);
  const double used = engine.gradient_norm();
  engine.update(1, 1, used, 0);
  const auto sometimes = values(head.sometimes->local()), always = values(head.always->local()), fixed = values(head.fixed->local());

  engine.forward_backward(batch, 2);
  EXPECT_FALSE(head.sometimes->leaf()->has_grad());
  double expected = 0;
  for (const double x : fixed) expected += x * x;
  EXPECT_NEAR(engine.gradient_norm(), std::sqrt(expected), 1e-6);  // what step 1 left in the buffer does not count
  EXPECT_GT(used, std::sqrt(expected));
  engine.update(2, 1, 1, 0);
  EXPECT_EQ(values(head.sometimes->local()), sometimes);
  EXPECT_NE(values(head.always->local()), always);
  EXPECT_EQ(values(head.fixed->local()), fixed);
}

TEST_F(Sessions, NormAndClippingAreOfTheWholeGradient) {
  const std::vector<std::string> words{"precision.compute=f64", "optimizer={plugin: sgd, lr: 1, momentum: 0}"};
  auto s = open(words);
  const auto before = parameters(*s->engine);
  s->engine->forward_backward(batch_of(*s, 0, 4, 4), 1);
  double squares = 0;
  for (Parameter* p : s->model->parameters())
    for (const double g : values(p->leaf()->grad())) squares += g * g;
  const double norm = s->engine->gradient_norm();
  EXPECT_NEAR(norm, std::sqrt(squares), 1e-12 * norm);
  EXPECT_GT(norm, 0.1);
  s->engine->update(1, 1, norm, norm / 4);
  double moved = 0;
  const auto after = parameters(*s->engine);
  for (const auto& [name, values] : after)
    for (std::size_t i = 0; i < values.size(); ++i) moved += std::pow(values[i] - before.at(name)[i], 2);
  EXPECT_NEAR(std::sqrt(moved), norm / 4, 1e-10);
}

TEST_F(Sessions, NonFiniteGradientsAreFoundByName) {
  auto s = open({});
  s->engine->forward_backward(batch_of(*s, 0, 2, 2), 1);
  EXPECT_TRUE(std::isfinite(s->engine->gradient_norm()));
  EXPECT_EQ(s->engine->first_nonfinite_gradient(), "");
  Parameter* p = s->model->parameters()[4];
  p->leaf()->grad().data<float>()[1] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(std::isfinite(s->engine->gradient_norm()));
  EXPECT_EQ(s->engine->first_nonfinite_gradient(), p->name());
  s->engine->discard();
  EXPECT_FALSE(p->leaf()->has_grad());
  EXPECT_EQ(s->engine->gradient_norm(), 0);
}

TEST_F(Sessions, EvaluationRecordsNothingAndDropsNothing) {
  auto s = open({"model.dropout=0.5"});
  const Batch batch = batch_of(*s, 0, 4, 4);
  const std::int64_t held = s->device->bytes_held();
  const double a = s->engine->evaluate(batch)[0].sum.item(), b = s->engine->evaluate(batch)[0].sum.item();
  EXPECT_EQ(a, b);
  EXPECT_NEAR(a, std::log(256), 0.1);
  EXPECT_EQ(s->device->bytes_held(), held);
  for (Parameter* p : s->model->parameters()) EXPECT_FALSE(p->leaf()->has_grad());
}

TEST_F(Sessions, CheckpointsSeeMastersAndStatesByName) {
  auto s = open({"precision.compute=bf16"});
  const auto all = s->engine->tensors(true);
  EXPECT_EQ(all.size(), 3 * s->model->parameters().size());
  for (const NamedTensor& t : all) EXPECT_EQ(t.value.dtype(), DType::f32) << t.name;
  EXPECT_EQ(all[0].name, "model/" + s->model->parameters()[0]->name());
  EXPECT_EQ(s->model->parameters()[0]->local().dtype(), DType::bf16);
  EXPECT_EQ(s->engine->tensors(false).size(), s->model->parameters().size());
  // A change from outside reaches the working copies by publish().
  all[0].value.fill(3);
  s->engine->publish();
  EXPECT_EQ(values(s->model->parameters()[0]->local())[7], 3);
}

}  // namespace
}  // namespace capstan::engine_test
