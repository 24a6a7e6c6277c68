// The walk over a model's calls: the same gradients as one graph over everything, values that several calls read, losses
// in the middle, blocks that are called twice, hooks, recomputation and memory.
#include "model/call_run.h"

#include <capstan/ops.h>
#include <capstan/walk.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string error_of(Fault fault, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& e) {
    EXPECT_EQ(static_cast<int>(e.fault()), static_cast<int>(fault)) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no Error";
  return "";
}

ParameterSpec square(std::int64_t n, double std = 0.3) {
  ParameterSpec spec;
  spec.dims = {{{"out", n, 1, ""}}, {{"in", n, 1, ""}}};
  spec.init = {Init::Kind::normal, std};
  return spec;
}

constexpr std::int64_t rows = 6, width = 8;

/// What a block of the tests does is a function.
class Does : public Block {
 public:
  Does(const std::string& name, std::function<void(Does&, ForwardContext&)> what) : Block(name), what_(std::move(what)) { w = &declare("w", square(width)); }
  void forward(ForwardContext& c) override {
    ++runs;
    what_(*this, c);
  }
  Parameter* w;
  int runs = 0;

 private:
  std::function<void(Does&, ForwardContext&)> what_;
};

class LastHead : public Head {
 public:
  LastHead() : Head("head") { w = &declare("w", square(width)); }
  void forward(ForwardContext& c) override {
    ++runs;
    c.loss("lm", ops::sum_all(ops::tanh(ops::linear(ops::add(c.get("h"), c.get("skip")), c.use(*w)))), rows);
  }
  Score score(ForwardContext&, const Tensor&, const Tensor*, Tensor*) override { return {}; }
  Tensor logits(ForwardContext&, const Tensor&) override { return {}; }
  std::int64_t vocabulary() const override { return 1; }
  Parameter* w;
  int runs = 0;
};

/// first: -> h, skip; middle (called twice): h -> h, with a loss of its own; head: h, skip -> loss.
class Forked : public Model {
 public:
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view) override { return head_; }
  std::int64_t vocabulary() const override { return 1; }
  std::int64_t hidden() const override { return width; }
  std::int64_t longest() const override { return 0; }
  std::string describe() const override { return "forked"; }

  Does first{"first", [](Does& b, ForwardContext& c) {
    const Tensor x = ops::linear(ops::cast(ops::reshape(c.batch.stream("x"), {rows, width}), c.dtype), c.use(*b.w));
    c.set("h", ops::tanh(x));
    c.set("skip", ops::sigmoid(x));
  }};
  Does middle{"middle", [](Does& b, ForwardContext& c) {
    Tensor h = ops::linear(c.get("h"), c.use(*b.w), {}, c.get("h"));
    h = ops::dropout(h, c.training ? 0.25 : 0, c.random("middle"), c.batch.space().sample_ids);
    c.loss("auxiliary", ops::sum_all(ops::mul(h, h)), rows, 0.125);
    c.set("h", ops::gelu(h));
  }};
  LastHead head_;
  std::vector<Call> calls_{{&first, {}, {"h", "skip"}}, {&middle, {"h"}, {"h"}}, {&middle, {"h"}, {"h"}}, {&head_, {"h", "skip"}, {}}};
};

class Walk : public ::testing::Test {
 protected:
  Walk() {
    for (Parameter* p : model.parameters()) {
      const Tensor t = Tensor::empty(p->shape(), DType::f64, *device);
      p->initialize(3, t);
      p->place(t);
    }
    const std::vector<std::int32_t> tokens(rows, 0), lengths{static_cast<std::int32_t>(rows)};
    batch = make_batch(*device, tokens, lengths);
    std::vector<double> x;
    const Rng rng(4, "x");
    for (std::uint64_t i = 0; i < rows * width; ++i) x.push_back(rng.normal(i));
    batch.set("x", Tensor::of<double>(x, {rows, width}, *device));
  }
  ForwardContext context() {
    ForwardContext c(batch, *device, DType::f64);
    c.grad = c.training = true;
    c.step = 9;
    return c;
  }
  static std::vector<double> values(const Tensor& t) { return {t.data<double>(), t.data<double>() + t.numel()}; }
  std::vector<std::vector<double>> gradients() {
    std::vector<std::vector<double>> all;
    for (Parameter* p : model.parameters()) {
      all.push_back(values(p->leaf()->grad()));
      p->leaf()->clear();
    }
    return all;
  }
  /// One graph over all calls, walked once.
  std::vector<std::vector<double>> in_one_graph() {
    ForwardContext c = context();
    run_forward(model, c, true);
    Tensor loss;
    for (const LossEntry& l : c.losses()) {
      const Tensor part = ops::scale(l.sum, l.weight);
      loss = loss.defined() ? ops::add(loss, part) : part;
    }
    backward(loss);
    return gradients();
  }

  std::shared_ptr<Device> device = make_cpu_device(1);
  Forked model;
  Batch batch;
};

void expect_near(const std::vector<std::vector<double>>& a, const std::vector<std::vector<double>>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    double size = 0;
    for (std::size_t k = 0; k < a[i].size(); ++k) {
      size += std::abs(b[i][k]);
      ASSERT_NEAR(a[i][k], b[i][k], 1e-12) << i << " " << k;
    }
    EXPECT_GT(size, 0.01) << i;
  }
}

TEST_F(Walk, CallByCallIsTheGradientOfTheWhole) {
  const auto expected = in_one_graph();
  ForwardContext c = context();
  forward_backward(model, c);
  expect_near(gradients(), expected);
  std::vector<std::string> names;
  for (const LossEntry& l : c.losses()) {
    names.push_back(l.name);
    EXPECT_FALSE(l.sum.requires_grad());
  }
  EXPECT_THAT(names, ElementsAre("auxiliary", "auxiliary", "lm"));
}

TEST_F(Walk, RecomputedCallsRunTwiceAndChangeNoBit) {
  ForwardContext plain = context();
  forward_backward(model, plain);
  const auto expected = gradients();
  EXPECT_EQ(model.middle.runs, 2);
  ForwardContext c = context();
  forward_backward(model, c, {}, true);
  EXPECT_EQ(gradients(), expected);
  EXPECT_EQ(model.middle.runs, 2 + 4);
  EXPECT_EQ(model.first.runs, 1 + 2);
  EXPECT_EQ(model.head_.runs, 1 + 1);  // the head computes its gradient in the forward
  ASSERT_EQ(c.losses().size(), 3u);    // not those of the second runs as well
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(c.losses()[i].sum.item(), plain.losses()[i].sum.item());
  // One call alone, by its own mark.
  model.calls_[2].recompute = true;
  ForwardContext one = context();
  forward_backward(model, one);
  EXPECT_EQ(gradients(), expected);
  EXPECT_EQ(model.middle.runs, 6 + 3);
}

TEST_F(Walk, ValuesThatACallDoesNotDeclareAreRefused) {
  // Without its declaration the head would get skip, and first would never hear of its gradient.
  model.calls_[3].reads = {"h"};
  ForwardContext c = context();
  EXPECT_THAT(error_of(Fault::programming, [&] { forward_backward(model, c); }), AllOf(HasSubstr("[head]"), HasSubstr("'skip'"), HasSubstr("reads: h)")));
  model.calls_[3].reads = {"h", "skip"};
  model.calls_[0].writes = {"h"};
  ForwardContext d = context();
  EXPECT_THAT(error_of(Fault::programming, [&] { forward_backward(model, d); }), AllOf(HasSubstr("[first]"), HasSubstr("'skip'"), HasSubstr("writes: h)")));
  ForwardContext e = context();  // recomputed calls are watched as well
  EXPECT_THAT(error_of(Fault::programming, [&] { forward_backward(model, e, {}, true); }), HasSubstr("'skip'"));
  // Without a graph nothing can be lost, and the context is as it was.
  ForwardContext plain(batch, *device, DType::f64);
  run_forward(model, plain, true);
  EXPECT_TRUE(plain.has("skip"));
}

TEST_F(Walk, WhatACallWritesItMayReadAgain) {
  Does own("own", [](Does& b, ForwardContext& c) {
    c.set("sum", ops::linear(c.get("h"), c.use(*b.w)));
    c.set("h", ops::add(c.get("sum"), c.get("h")));
  });
  const Tensor w = Tensor::empty(own.w->shape(), DType::f64, *device);
  own.w->initialize(3, w);
  own.w->place(w);
  model.calls_.insert(model.calls_.begin() + 1, Call{&own, {"h"}, {"h", "sum"}});
  const auto expected = in_one_graph();
  ForwardContext c = context();
  forward_backward(model, c);
  expect_near(gradients(), expected);
}

TEST_F(Walk, InputAndWeightPartsAreTheWholeBackward) {
  ForwardContext plain = context();
  forward_backward(model, plain);
  const auto expected = gradients();
  for (const bool recompute : {false, true}) {
    ForwardContext c = context();
    const WalkHooks none;
    CallRun all(model.calls(), c, none, recompute);
    all.forward();
    ValueGradients grads;
    all.backward(grads, Part::input);
    EXPECT_FALSE(model.first.w->leaf()->has_grad());
    EXPECT_FALSE(model.middle.w->leaf()->has_grad());
    all.backward_weight();
    EXPECT_EQ(gradients(), expected);
  }
}

TEST_F(Walk, RunsOfCallsHandGradientsOn) {
  ForwardContext plain = context();
  forward_backward(model, plain);
  const auto expected = gradients();
  ForwardContext c = context();
  const WalkHooks none;
  const std::span<const Call> calls(model.calls());
  CallRun a(calls.subspan(0, 2), c, none, false), b(calls.subspan(2), c, none, false);
  a.forward();
  b.forward();
  ValueGradients grads;
  b.backward(grads);
  EXPECT_EQ(grads.size(), 2u);
  EXPECT_TRUE(grads.at("h").defined() && grads.at("skip").defined());
  EXPECT_FALSE(model.first.w->leaf()->has_grad());
  a.backward(grads);
  EXPECT_TRUE(grads.empty());
  EXPECT_EQ(gradients(), expected);
}

TEST_F(Walk, HooksSurroundEachCallBothWays) {
  std::vector<std::string> told;
  const auto name = [&](const Call& call) { return call.block->name() + std::to_string(&call - model.calls_.data()); };
  WalkHooks hooks;
  hooks.before = [&](const Call& call, WalkStep::Kind step) { told.push_back((step == WalkStep::backward ? "<" : ">") + name(call)); };
  hooks.after = [&](const Call& call, WalkStep::Kind) { told.push_back(name(call) + "."); };
  ForwardContext c = context();
  forward_backward(model, c, hooks);
  EXPECT_THAT(told, ElementsAre(">first0", "first0.", ">middle1", "middle1.", ">middle2", "middle2.", ">head3", "head3.",  //
                                "<head3", "head3.", "<middle2", "middle2.", "<middle1", "middle1.", "<first0", "first0."));
}

TEST_F(Walk, ParametersAreDoneWhenTheirFirstCallIs) {
  std::vector<std::string> order;
  for (Parameter* p : model.parameters()) p->leaf()->hook = [&order, p](Leaf&) { order.push_back(p->name()); };
  ForwardContext c = context();
  forward_backward(model, c);
  EXPECT_THAT(order, ElementsAre("head.w", "middle.w", "first.w"));
}

TEST_F(Walk, NothingStaysButGradientsAndLosses) {
  {
    ForwardContext c = context();
    forward_backward(model, c);
  }
  const std::int64_t held = device->bytes_held();
  for (int i = 0; i < 3; ++i) {
    ForwardContext c = context();
    forward_backward(model, c);
  }
  EXPECT_EQ(device->bytes_held(), held);
}

TEST_F(Walk, ForwardAloneLeavesHeadsOutWhenTold) {
  ForwardContext c(batch, *device, DType::f64);
  run_forward(model, c, false);
  EXPECT_EQ(model.head_.runs, 0);
  EXPECT_FALSE(c.get("h").requires_grad());
  EXPECT_EQ(c.get("h").shape(), (Dims{rows, width}));
}

TEST_F(Walk, MissingValuesAreNamed) {
  ForwardContext c = context();
  c.set("skip", Tensor());
  EXPECT_THAT(error_of(Fault::programming, [&] { c.get("h"); }), AllOf(HasSubstr("'h'"), HasSubstr("skip")));
  c.drop("skip");
  EXPECT_FALSE(c.has("skip"));
  EXPECT_THAT(error_of(Fault::programming, [&] { batch.stream("tokenz"); }), AllOf(HasSubstr("tokenz"), HasSubstr("tokens"), HasSubstr("x")));
  EXPECT_THAT(error_of(Fault::programming, [&] { batch.space("image"); }), HasSubstr("image"));
}

TEST_F(Walk, MemosAreMadeOnce) {
  ForwardContext c = context();
  int made = 0;
  const auto make = [&] { return ++made, Tensor::full({}, made, DType::f64, *device); };
  EXPECT_EQ(c.memo("a", make).item(), 1);
  EXPECT_EQ(c.memo("a", make).item(), 1);
  EXPECT_EQ(c.memo("b", make).item(), 2);
}

TEST(Models, NamesAreIdentities) {
  Forked model;
  std::vector<std::string> names;
  for (Parameter* p : model.parameters()) names.push_back(p->name());
  EXPECT_THAT(names, ElementsAre("first.w", "middle.w", "head.w"));  // in call order, once each
  Does twin("middle", [](Does&, ForwardContext&) {});
  model.calls_.push_back({&twin, {}, {}});
  EXPECT_THAT(error_of(Fault::programming, [&] { model.parameters(); }), HasSubstr("'middle.w'"));
}

// Initial values have addresses: rows made apart, and pieces of fused tensors, are those of the whole.
TEST(Parameters, InitialValuesDoNotDependOnWhoMakesThem) {
  const auto device = make_cpu_device(1);
  ParameterSpec fused;
  fused.dims = {{{"heads", 3, 5, "q"}, {"kv_heads", 1, 5, "k"}}, {{"hidden", 7, 1, ""}}};
  fused.init = {Init::Kind::normal, 2};
  const Parameter p("qkv", fused);
  const Tensor whole = Tensor::empty({20, 7}, DType::f32, *device);
  p.initialize(8, whole);
  for (const std::int64_t cut : {1, 13, 15, 17}) {
    const Tensor a = Tensor::empty({cut, 7}, DType::f32, *device), b = Tensor::empty({20 - cut, 7}, DType::f32, *device);
    p.initialize(8, a, 0);
    p.initialize(8, b, cut);
    for (std::int64_t i = 0; i < 140; ++i) ASSERT_EQ(i < cut * 7 ? a.data<float>()[i] : b.data<float>()[i - cut * 7], whole.data<float>()[i]) << cut << " " << i;
  }
  ParameterSpec apart;
  apart.dims = {{{"kv_heads", 1, 5, ""}}, {{"hidden", 7, 1, ""}}};
  apart.init = fused.init;
  const Parameter k("qkv/k", apart);
  const Tensor alone = Tensor::empty({5, 7}, DType::f32, *device);
  k.initialize(8, alone);
  double squares = 0;
  for (std::int64_t i = 0; i < 35; ++i) ASSERT_EQ(alone.data<float>()[i], whole.data<float>()[105 + i]);
  for (std::int64_t i = 0; i < 140; ++i) squares += std::pow(static_cast<double>(whole.data<float>()[i]), 2) / 140;
  EXPECT_NEAR(squares, 4, 1.5);
  const Tensor other = Tensor::empty({20, 7}, DType::f32, *device);
  p.initialize(9, other);
  EXPECT_NE(other.data<float>()[0], whole.data<float>()[0]);
  EXPECT_THAT(error_of(Fault::programming, [&] { p.initialize(8, other, 1); }), AllOf(HasSubstr("qkv"), HasSubstr("[20, 7]")));
  EXPECT_THAT(error_of(Fault::programming, [&] { p.local(); }), AllOf(HasSubstr("qkv"), HasSubstr("before an engine placed it")));
}

TEST(Parameters, DerivedFormsFollowTheVersion) {
  const auto device = make_cpu_device(1);
  Parameter p("w", square(2));
  const Tensor t = Tensor::full({2, 2}, 1, DType::f32, *device);
  p.place(t);
  int made = 0;
  const auto twice = [&](const Tensor& x, const Tensor& form) { ++made, form.copy_from(ops::scale(x, 2)); };
  const auto form = [&]() -> const Tensor& { return p.derived("twice", Dims{2, 2}, DType::f32, twice); };
  EXPECT_EQ(form().data<float>()[0], 2);
  const void* place = form().raw();
  EXPECT_EQ(made, 1);
  t.fill(5);
  p.changed();
  EXPECT_EQ(form().data<float>()[0], 10);
  EXPECT_EQ(made, 2);
  t.fill(6);
  p.changed();
  p.refresh_derived();
  p.refresh_derived();
  EXPECT_EQ(made, 3);
  EXPECT_EQ(form().data<float>()[0], 12);
  EXPECT_EQ(made, 3);
  EXPECT_EQ(form().raw(), place) << "what was recorded reads it there";
}

TEST(Batches, PositionsRestartAndAddressesRunOn) {
  const auto device = make_cpu_device(1);
  const std::vector<std::int32_t> tokens{1, 2, 3, 4, 5, 6}, lengths{2, 3}, targets{2, -1, 4, 5, -1, -1};
  const Batch b = make_batch(*device, tokens, lengths, targets, {}, 100);
  const Space& s = b.space();
  EXPECT_EQ(s.sequences(), 2);
  EXPECT_EQ(s.used(), 5);
  EXPECT_EQ(s.capacity, 6);
  EXPECT_EQ(s.longest, 3);
  EXPECT_EQ(b.step_weight, 3);
  const auto* positions = s.positions.data<std::int32_t>();
  EXPECT_THAT(std::vector<int>(positions, positions + 5), ElementsAre(0, 1, 0, 1, 2));
  EXPECT_EQ(s.sample_ids.data<std::int64_t>()[5], 105);
  const std::vector<std::int32_t> long_ones{4, 4};
  EXPECT_THAT(error_of(Fault::programming, [&] { make_batch(*device, tokens, long_ones); }), HasSubstr("more than the 6 tokens"));
}

}  // namespace
}  // namespace capstan
