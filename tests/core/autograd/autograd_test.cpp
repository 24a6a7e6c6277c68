// The walk through the graph: shared nodes, leaves and their hooks, freed graphs, the two halves of a backward.
#include <capstan/autograd.h>
#include <capstan/ops.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Autograd : public ::testing::Test {
 protected:
  Tensor random(const Dims& shape, DType dtype, const std::string& name) {
    std::vector<double> values(static_cast<std::size_t>(shape.product()));
    const Rng rng(5, name);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = rng.normal(i);
    return Tensor::of<double>(values, shape, *device).to(dtype);
  }
  Tensor scalar(double x) { return Tensor::full({}, x, DType::f64, *device); }
  static std::string error_of(const std::function<void()>& act) {
    try {
      act();
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::programming);
      return e.what();
    }
    ADD_FAILURE() << "no Error";
    return "";
  }
  static Leaf& leaf(const Tensor& t) { return *static_cast<Leaf*>(t.node().get()); }
  static double grad(const Tensor& t) { return leaf(t).grad().item(); }

  std::shared_ptr<Device> device = make_cpu_device(2);
};

// y = (x^2 + x)^2 through two ways from x and two from s: dy/dx = 2 (x^2 + x) (2 x + 1).
TEST_F(Autograd, DiamondsAddUp) {
  for (const bool parameter : {true, false}) {
    const Tensor x = make_leaf(scalar(3), parameter);
    const Tensor s = ops::add(ops::mul(x, x), x);
    backward(ops::mul(s, s));
    EXPECT_EQ(grad(x), 2 * 12 * 7);
  }
}

// Ten diamonds in a row have 2^10 ways: a walk by ways instead of nodes would run their nodes 1,024 times.
struct Counting : Node {
  explicit Counting(int* runs) : runs(runs) {}
  std::string_view name() const override { return "counting"; }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override {
    ++*runs;
    return {grads[0]};
  }
  void release() override {}
  int* runs;
};

TEST_F(Autograd, EachNodeRunsOnceAfterAllItsConsumers) {
  const Tensor x = make_leaf(scalar(1), true);
  Tensor t = x;
  int runs = 0;
  for (int i = 0; i < 10; ++i) {
    Tensor out = t.detach();
    record(std::make_shared<Counting>(&runs), {&t}, {&out});
    t = ops::add(out, out);
  }
  backward(t);
  EXPECT_EQ(runs, 10);
  EXPECT_EQ(grad(x), 1024);
}

TEST_F(Autograd, HooksFireOnceAfterTheLastUse) {
  const Tensor w = make_leaf(random({4, 4}, DType::f64, "w"), true);
  const Tensor x = random({3, 4}, DType::f64, "x");
  int fired = 0;
  double seen = 0;
  leaf(w).hook = [&](Leaf& l) {
    ++fired;
    seen = ops::sum_all(l.grad()).item();
  };
  const Tensor y = ops::linear(ops::linear(ops::linear(x, w), w), w);
  backward(ops::sum_all(y));
  EXPECT_EQ(fired, 1);
  EXPECT_EQ(seen, ops::sum_all(leaf(w).grad()).item());  // nothing came after it
  EXPECT_NE(seen, 0);
  leaf(w).clear();
  backward(ops::sum_all(ops::linear(x, w)));
  EXPECT_EQ(fired, 2);
}

// An engine's gradient buffer keeps its place; the first contribution overwrites what is left in it.
TEST_F(Autograd, BuffersAreOverwrittenAndThenAddedTo) {
  const Tensor w = make_leaf(random({4, 4}, DType::f32, "w"), true);
  const Tensor x = random({3, 4}, DType::f32, "x");
  const Tensor buffer = Tensor::full({4, 4}, 1e30, DType::f32, *device);
  leaf(w).set_buffer(buffer);
  EXPECT_FALSE(leaf(w).has_grad());
  backward(ops::sum_all(ops::linear(x, w)));
  EXPECT_TRUE(leaf(w).has_grad());
  const Tensor once = buffer.clone();
  EXPECT_LT(std::abs(ops::sum_all(once).item()), 1e6);
  backward(ops::sum_all(ops::linear(x, w)));
  for (int i = 0; i < 16; ++i) EXPECT_EQ(buffer.data<float>()[i], 2 * once.data<float>()[i]);
  leaf(w).clear();
  backward(ops::sum_all(ops::linear(x, w)));
  EXPECT_EQ(std::memcmp(buffer.raw(), once.raw(), 64), 0);
}

// What one consumer hands on must not change when another's is added to it.
TEST_F(Autograd, SharedGradientsAreNotWritten) {
  const Tensor a = make_leaf(scalar(2), false), b = make_leaf(scalar(5), false);
  const Tensor s = ops::add(a, b);         // hands one gradient to both
  backward(ops::add(ops::mul(a, a), s));   // a has two uses, b one
  EXPECT_EQ(grad(a), 5);
  EXPECT_EQ(grad(b), 1);
}

TEST_F(Autograd, SeveralRootsInOneWalk) {
  const Tensor x = make_leaf(scalar(3), false);
  const Tensor square = ops::mul(x, x);
  const Tensor roots[] = {square, ops::mul(square, x), square};
  const Tensor grads[] = {scalar(2), scalar(1), Tensor()};
  backward(roots, grads);
  EXPECT_EQ(grad(x), 2 * 6 + 27 + 6);
}

TEST_F(Autograd, ErrorsSayWhatToDo) {
  const Tensor x = make_leaf(scalar(3), false);
  const Tensor y = ops::mul(x, x);
  backward(y);
  EXPECT_THAT(error_of([&] { backward(y); }), AllOf(HasSubstr("freed by an earlier backward"), HasSubstr("run the forward again")));
  EXPECT_THAT(error_of([&] { backward(ops::scale(y, 2)); }), HasSubstr("freed by an earlier backward"));
  EXPECT_THAT(error_of([&] { backward(scalar(1)); }), HasSubstr("has no graph"));
  const Tensor v = make_leaf(random({3}, DType::f64, "v"), false);
  EXPECT_THAT(error_of([&] { backward(ops::scale(v, 2)); }), AllOf(HasSubstr("[3]"), HasSubstr("needs a gradient")));
  const Tensor root[] = {ops::scale(v, 2)};
  const Tensor wrong[] = {random({4}, DType::f64, "g")};
  EXPECT_THAT(error_of([&] { backward(root, wrong); }), AllOf(HasSubstr("expected [3]"), HasSubstr("got [4]")));
}

/// Returns whatever it was made with, where it is wanted.
struct Returning : Node {
  explicit Returning(std::vector<Tensor> gradients) : gradients(std::move(gradients)) {}
  std::string_view name() const override { return "returning"; }
  std::vector<Tensor> backward(std::span<const Tensor>, Part part) override {
    std::vector<Tensor> returned = gradients;
    for (int i = 0; i < static_cast<int>(returned.size()); ++i)
      if (!wants(i, part)) returned[static_cast<std::size_t>(i)] = Tensor();
    return returned;
  }
  void release() override {}
  std::vector<Tensor> gradients;
};

// A plugin's node may be wrong: its gradients are taken by number of elements, and one too short would be read past its end.
TEST_F(Autograd, GradientsOfAnotherShapeOrTypeAreRefused) {
  const auto walk = [&](const Tensor& second, const Tensor& gradient, Part part = Part::both) {
    const Tensor first = make_leaf(random({2, 3}, DType::f32, "first"), false);
    Tensor out = scalar(1);
    record(std::make_shared<Returning>(std::vector<Tensor>{Tensor(), gradient}), {&first, &second}, {&out});
    const Tensor roots[] = {out};
    backward(roots, {}, part).run();
  };
  const auto refused = [&](const Tensor& second, const Tensor& gradient, Part part, const std::string& expected_got) {
    EXPECT_EQ(error_of([&] { walk(second, gradient, part); }),
              "[returning] the gradient that its backward returned for input 1: " + expected_got);
  };
  const Tensor input = make_leaf(random({4, 3}, DType::f32, "input"), false), weight = make_leaf(random({4, 3}, DType::f32, "weight"), true);
  const Tensor inner = ops::scale(input, 2);
  const Tensor good = random({4, 3}, DType::f32, "good"), turned = random({3, 4}, DType::f32, "turned"), wide = random({4, 3}, DType::f64, "wide");
  for (const Tensor& t : {input, inner}) {
    refused(t, turned, Part::both, "expected f32 [4, 3], as the input, got f32 [3, 4]");
    refused(t, wide, Part::both, "expected f32 [4, 3], as the input, got f64 [4, 3]");
  }
  refused(weight, turned, Part::both, "expected [4, 3], as the input, got f32 [3, 4]");
  refused(weight, turned, Part::input, "expected [4, 3], as the input, got f32 [3, 4]");
  walk(inner, good);
  walk(weight, good);
  walk(weight, wide);  // a parameter adds in the type of its own gradient
}

TEST_F(Autograd, SavedTensorsGoAsTheWalkGoes) {
  const Tensor w = make_leaf(random({64, 64}, DType::f32, "w"), true);
  const Tensor x = make_leaf(random({512, 64}, DType::f32, "x"), false);
  const std::int64_t before = device->bytes_held();
  Tensor y = x;
  for (int i = 0; i < 8; ++i) y = ops::gelu(ops::linear(y, w));
  Tensor loss = ops::sum_all(y);
  y = Tensor();
  const std::int64_t with_graph = device->bytes_held();
  EXPECT_GT(with_graph, before + 8 * 512 * 64 * 4);
  backward(loss);
  EXPECT_LE(device->bytes_held(), before + 512 * 64 * 4 + 64 * 64 * 4 + 64 * 4);  // the two gradients and the loss
}

TEST_F(Autograd, AHundredThousandNodesInARowAreWalkedAndFreed) {
  for (const bool walked : {true, false}) {
    const Tensor x = make_leaf(scalar(1), true);
    Tensor t = x;
    for (int i = 0; i < 100'000; ++i) t = i % 2 == 0 ? ops::scale(t, 1) : ops::mul(t, scalar(1));
    if (walked) {
      backward(t);
      EXPECT_EQ(grad(x), 1);
    }
    t = Tensor();
  }
}

/// Normalization, fused projections, attention, projection back with the residual: a block as models have them.
struct BlockGraph {
  std::vector<Tensor> parameters;
  Tensor x, y;
};

class Parts : public Autograd, public ::testing::WithParamInterface<DType> {
 protected:
  BlockGraph build() {
    constexpr std::int64_t t = 24, c = 32;
    const DType type = GetParam();
    BlockGraph g;
    auto parameter = [&](const Dims& shape, const std::string& name) {
      g.parameters.push_back(make_leaf(ops::scale(random(shape, DType::f64, name), 0.2).to(type), true));
      return g.parameters.back();
    };
    std::vector<std::int32_t> tokens(t, 0);
    const std::vector<std::int32_t> lengths{10, 14};
    batch = make_batch(*device, tokens, lengths);
    g.x = make_leaf(random({t, c}, type, "x"), false);
    const Tensor h = ops::rms_norm(g.x, parameter({c}, "norm"), 1e-5);
    const Tensor qkv = ops::linear(h, parameter({3 * c, c}, "qkv"), parameter({3 * c}, "bias"));
    const std::int64_t widths[] = {c, c, c};
    const std::vector<Tensor> parts = ops::split(qkv, widths);
    const Tensor a = ops::attention(parts[0], parts[1], parts[2], batch.space(), {2, 2, 16, 0});
    const Tensor r = ops::linear(a, parameter({c, c}, "out"), {}, g.x);
    const Tensor n = ops::layer_norm(r, parameter({c}, "norm2"), parameter({c}, "norm2.bias"), 1e-5);
    g.y = ops::linear(ops::swiglu(ops::linear(n, parameter({2 * c, c}, "up"))), parameter({c, c}, "down"), {}, r);
    return g;
  }
  static std::vector<char> bytes(const Tensor& t) {
    const Tensor whole = t.contiguous();
    std::vector<char> all(static_cast<std::size_t>(whole.bytes()));
    whole.copy_to_host(all.data(), whole.bytes());
    return all;
  }
  Batch batch;
};

TEST_P(Parts, InputFirstAndWeightsLaterGiveTheSameBits) {
  const BlockGraph whole = build(), halves = build();
  const Tensor seed = random(whole.y.shape(), GetParam(), "seed");
  const Tensor whole_root[] = {whole.y}, halves_root[] = {halves.y}, grads[] = {seed};
  EXPECT_TRUE(backward(whole_root, grads, Part::both).items.empty());

  Deferred later = backward(halves_root, grads, Part::input);
  EXPECT_EQ(bytes(leaf(halves.x).grad()), bytes(leaf(whole.x).grad()));
  for (const Tensor& p : halves.parameters) EXPECT_FALSE(leaf(p).has_grad());
  EXPECT_FALSE(later.items.empty());
  EXPECT_THAT(error_of([&] { backward(halves_root, grads); }), HasSubstr("freed by an earlier backward"));

  later.run();
  EXPECT_TRUE(later.items.empty());
  for (std::size_t i = 0; i < whole.parameters.size(); ++i) {
    ASSERT_TRUE(leaf(halves.parameters[i]).has_grad()) << i;
    EXPECT_EQ(bytes(leaf(halves.parameters[i]).grad()), bytes(leaf(whole.parameters[i]).grad())) << i;
  }
}

TEST_P(Parts, HooksOfParametersWaitForTheSecondHalf) {
  const BlockGraph g = build();
  std::size_t fired = 0;
  for (const Tensor& p : g.parameters) leaf(p).hook = [&](Leaf&) { ++fired; };
  const Tensor root[] = {g.y}, grads[] = {random(g.y.shape(), GetParam(), "seed")};
  Deferred later = backward(root, grads, Part::input);
  EXPECT_EQ(fired, 0u);
  later.run();
  EXPECT_EQ(fired, g.parameters.size());
}

INSTANTIATE_TEST_SUITE_P(Types, Parts, ::testing::Values(DType::f64, DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace capstan
