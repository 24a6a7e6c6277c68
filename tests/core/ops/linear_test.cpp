// linear and matmul: against each other, rows alone and in a batch, gradients into leaves.
#include "core/ops/harness.h"

#include <gmock/gmock.h>
#include <kernels/backend.h>

namespace capstan::testing {
namespace {

using Ins = std::span<const Tensor>;
using ::testing::HasSubstr;

std::vector<Case> linear_cases() {
  std::vector<Case> cases;
  struct Shape { std::int64_t rows, in, out; };
  for (auto [rows, in, out] : {Shape{1, 1, 1}, {3, 17, 5}, {31, 33, 65}, {66, 65, 80}}) {
    const Input x{{rows, in}}, w{{out, in}, -1, 1, false, true}, b{{out}, -1, 1, false, true}, r{{rows, out}};
    const std::string suffix = std::string("_") + std::to_string(rows) + "x" + std::to_string(in) + "x" + std::to_string(out);
    const auto product = [](Ins t) { return ops::matmul(t[0], ops::transpose(t[1], 0, 1)); };
    cases.push_back({"linear" + suffix, {x, w}, [](const Place&, Ins t) { return ops::linear(t[0], t[1]); },
                     [product](const Place&, Ins t) { return product(t); }, true, false});
    cases.push_back({"linear_bias" + suffix, {x, w, b}, [](const Place&, Ins t) { return ops::linear(t[0], t[1], t[2]); },
                     [product](const Place&, Ins t) { return ops::add(product(t), t[2]); }, true, false});
    cases.push_back({"linear_residual" + suffix, {x, w, r}, [](const Place&, Ins t) { return ops::linear(t[0], t[1], {}, t[2]); },
                     [product](const Place&, Ins t) { return ops::add(product(t), t[2]); }, true, false});
    cases.push_back({"linear_bias_residual" + suffix, {x, w, b, r}, [](const Place&, Ins t) { return ops::linear(t[0], t[1], t[2], t[3]); },
                     [product](const Place&, Ins t) { return ops::add(ops::add(product(t), t[2]), t[3]); }, true, false});
    cases.push_back({"linear_gelu" + suffix, {x, w}, [](const Place&, Ins t) { return ops::linear_gelu(t[0], t[1]); },
                     [product](const Place&, Ins t) { return ops::gelu(product(t)); }, true, false});
    cases.push_back({"linear_gelu_bias" + suffix, {x, w, b}, [](const Place&, Ins t) { return ops::linear_gelu(t[0], t[1], t[2]); },
                     [product](const Place&, Ins t) { return ops::gelu(ops::add(product(t), t[2])); }, true, false});
  }
  for (const bool twice : {false, true})  // read once, its slope may be taken by the product of the gradient
    cases.push_back({twice ? "linear_of_linear_gelu_and_its_sum" : "linear_of_linear_gelu", {{{31, 33}}, {{65, 33}, -1, 1, false, true}, {{65}, -1, 1, false, true}, {{17, 65}, -1, 1, false, true}},
                     [twice](const Place&, Ins t) {
                       const Tensor y = ops::linear_gelu(t[0], t[1], t[2]), z = ops::linear(y, t[3]);
                       return twice ? ops::add(z, ops::slice(y, 1, 3, 17)) : z;
                     },
                     [twice](const Place&, Ins t) {
                       const Tensor y = ops::gelu(ops::add(ops::matmul(t[0], ops::transpose(t[1], 0, 1)), t[2])), z = ops::matmul(y, ops::transpose(t[3], 0, 1));
                       return twice ? ops::add(z, ops::slice(y, 1, 3, 17)) : z;
                     }, true, false});
  cases.push_back({"linear_of_a_slice", {{{9, 40}}, {{7, 20}, -1, 1, false, true}},
                   [](const Place&, Ins t) { return ops::linear(ops::slice(t[0], 1, 3, 20), t[1]); },
                   [](const Place&, Ins t) { return ops::matmul(ops::slice(t[0], 1, 3, 20), ops::transpose(t[1], 0, 1)); }, true, false});
  cases.push_back({"linear_with_a_computed_weight", {{{9, 5}}, {{7, 5}, -1, 1, false}},
                   [](const Place&, Ins t) { return ops::linear(t[0], ops::exp(t[1])); }, {}, true, false});
  return cases;
}
CAPSTAN_OP_CASES(Linear, linear_cases());

std::vector<Case> matmul_cases() {
  const auto f = [](const Place&, Ins t) { return ops::matmul(t[0], t[1]); };
  // The sum over k written out: [M, K, 1] * [1, K, N], summed over K.
  const auto plain = [](const Place&, Ins t) {
    const Dims a = t[0].shape(), b = t[1].shape();
    return ops::sum(ops::mul(ops::reshape(t[0], Dims{a[0], a[1], 1}), ops::reshape(t[1], Dims{1, b[0], b[1]})), 1);
  };
  return {
      {"matmul_1", {{{1, 1}}, {{1, 1}, -1, 1, false}}, f, plain, true, false},
      {"matmul_odd", {{{3, 17}}, {{17, 5}, -1, 1, false}}, f, plain, true, false},
      {"matmul_wide", {{{33, 65}}, {{65, 31}, -1, 1, false}}, f, plain, true, false},
      {"matmul_batched", {{{2, 3, 5, 7}}, {{2, 3, 7, 4}}}, f, {}},
      {"matmul_shared", {{{4, 5, 7}}, {{7, 3}, -1, 1, false}}, f, {}, true, false},
      {"matmul_transposed", {{{2, 7, 5}}, {{2, 3, 7}}},
       [](const Place&, Ins t) { return ops::matmul(ops::transpose(t[0], 1, 2), ops::transpose(t[1], 1, 2)); }, {}},
      {"matmul_itself", {{{6, 6}}}, [](const Place&, Ins t) { return ops::matmul(t[0], t[0]); }, {}},
  };
}
CAPSTAN_OP_CASES(Matmul, matmul_cases());

TEST(Matmul, BatchesAreSingleProducts) {
  auto device = tested_device(2);
  const Tensor a = make(*device, random_values(2 * 3 * 5, 1), Dims{2, 3, 5}, DType::f64);
  const Tensor b = make(*device, random_values(2 * 5 * 4, 2), Dims{2, 5, 4}, DType::f64), c = ops::matmul(a, b);
  for (int i = 0; i < 2; ++i) {
    const Tensor one = ops::matmul(a.narrow(0, i, 1).view(Dims{3, 5}), b.narrow(0, i, 1).view(Dims{5, 4}));
    EXPECT_TRUE(near(c.narrow(0, i, 1).view(Dims{3, 4}), one, DType::f64));
  }
}

// Across strips, panels and blocks of k: the fused form has the bits of the two ops, gradients included.
TEST(LinearGelu, IsGeluOfLinearToTheBit) {
  auto device = tested_device(2);
  struct Shape { std::int64_t rows, in, out; };
  for (auto [rows, in, out] : {Shape{1, 800, 70}, {150, 390, 300}, {301, 64, 257}})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const auto run = [&](bool fused) {
        std::vector<Tensor> leaves;
        for (const Dims& shape : {Dims{rows, in}, Dims{out, in}, Dims{out}})
          leaves.push_back(make_leaf(make(*device, random_values(shape.product(), leaves.size() + 1), shape, dtype), true));
        const Tensor y = fused ? ops::linear_gelu(leaves[0], leaves[1], leaves[2]) : ops::gelu(ops::linear(leaves[0], leaves[1], leaves[2]));
        backward(ops::sum_all(ops::mul(y, y)));
        std::vector<Tensor> all{y.detach()};
        for (const Tensor& l : leaves) all.push_back(static_cast<Leaf*>(l.node().get())->grad());
        return all;
      };
      const std::vector<Tensor> one = run(true), two = run(false);
      for (std::size_t i = 0; i < one.size(); ++i)
        EXPECT_TRUE(same_bits_on_the_cpu(one[i], two[i], dtype)) << rows << " x " << in << " x " << out << ", " << name_of(dtype) << ", value " << i;
    }
}

// A product after it may take GELU's slope on the way: the same bits, in one walk or in two parts. Not where another reads it too, and not
// where the walk begins there too: gradients would add up on both sides of GELU.
TEST(LinearGelu, GivesItsSlopeToTheProductThatAloneReadsIt) {
  auto device = tested_device(2);
  enum class Form { alone, in_parts, read_twice, root };
  for (const Form form : {Form::alone, Form::in_parts, Form::read_twice, Form::root}) {
    std::int64_t exact = 0;  // elements that the walk holds at most without it
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      struct Result { std::vector<Tensor> grads; std::int64_t memory = 0; };
      const auto run = [&](bool fused) {
        std::vector<Tensor> leaves;
        for (const Dims& shape : {Dims{150, 64}, Dims{300, 64}, Dims{300}, Dims{390, 300}, Dims{390}})
          leaves.push_back(make_leaf(make(*device, random_values(shape.product(), leaves.size() + 1), shape, dtype), true));
        const Tensor y = fused ? ops::linear_gelu(leaves[0], leaves[1], leaves[2]) : ops::gelu(ops::linear(leaves[0], leaves[1], leaves[2]));
        Tensor z = ops::linear(y, leaves[3], leaves[4]);
        const Tensor seed = make(*device, random_values(z.numel(), 7), z.shape(), dtype), at_y = make(*device, random_values(y.numel(), 8), y.shape(), dtype);
        std::vector<Tensor> roots{z}, seeds{seed};
        if (form == Form::read_twice) roots[0] = ops::add(z, ops::concat(std::vector<Tensor>{y, ops::slice(y, 1, 0, 90)}, 1));
        if (form == Form::root) roots.push_back(y), seeds.push_back(at_y);
        device->reset_peak();
        const std::int64_t held = device->bytes_held();
        if (form == Form::in_parts) backward(roots, seeds, Part::input).run();
        else backward(roots, seeds);
        Result result;
        result.memory = (device->bytes_peak() - held) / size_of(dtype);
        for (const Tensor& l : leaves) result.grads.push_back(static_cast<Leaf*>(l.node().get())->grad());
        return result;
      };
      const Result one = run(true), two = run(false);
      if (dtype == DType::f64) exact = one.memory;
      kernels::Gemm g;
      g.a = g.b = g.c = static_cast<kernels::Num>(dtype), g.m = 150, g.n = g.ldb = g.ldc = 300, g.k = g.lda = 390;
      const bool alone = form == Form::alone || form == Form::in_parts;
      if (dtype == DType::f32 && device->backend().takes_gelu_slope(g)) {
        EXPECT_EQ(one.memory < exact - 20000, alone) << one.memory << " and " << exact << ": alone, no gradient is held on each side of GELU; form " << static_cast<int>(form);
      }
      for (std::size_t i = 0; i < one.grads.size(); ++i)
        EXPECT_TRUE(same_bits_on_the_cpu(one.grads[i], two.grads[i], dtype)) << name_of(dtype) << ", form " << static_cast<int>(form) << ", gradient " << i;
    }
  }
}

TEST(Linear, AddsItsWeightGradientIntoTheLeaf) {
  auto device = tested_device(2);
  const Tensor x = make(*device, random_values(15, 1), Dims{5, 3}, DType::f32);
  const Tensor w = make_leaf(make(*device, random_values(12, 2), Dims{4, 3}, DType::f32), true);
  auto* leaf = static_cast<Leaf*>(w.node().get());
  const Tensor buffer = Tensor::full(Dims{4, 3}, NAN, DType::f32, *device);
  leaf->set_buffer(buffer);
  backward(ops::sum_all(ops::linear(x, w)));
  const std::vector<double> once = doubles(buffer);
  backward(ops::sum_all(ops::linear(x, w)));
  std::vector<double> twice = once;
  for (double& v : twice) v *= 2;
  EXPECT_TRUE(near(doubles(buffer), twice, tolerance_of(DType::f32)));
  const std::vector<double> xs = doubles(x);
  std::vector<double> columns(3, 0.0), want;
  for (std::size_t i = 0; i < xs.size(); ++i) columns[i % 3] += xs[i];
  for (int o = 0; o < 4; ++o) want.insert(want.end(), columns.begin(), columns.end());
  EXPECT_TRUE(near(once, want, tolerance_of(DType::f32)));
}

TEST(Linear, SaysWhatDoesNotFit) {
  auto device = tested_device(1);
  const auto t = [&](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype, *device); };
  EXPECT_THAT(error_of([&] { ops::linear(t({3, 4}), t({5, 6})); }), HasSubstr("[3, 4] and [5, 6]"));
  EXPECT_THAT(error_of([&] { ops::linear(t({3, 4}), t({5, 4}, DType::f64)); }), HasSubstr("f64"));
  EXPECT_THAT(error_of([&] { ops::linear(t({3, 4}), t({5, 4}), t({4})); }), HasSubstr("expected [5]"));
  EXPECT_THAT(error_of([&] { ops::linear(t({3, 4}), t({5, 4}), {}, t({3, 4})); }), HasSubstr("expected [3, 5]"));
  EXPECT_THAT(error_of([&] { ops::matmul(t({3, 4}), t({5, 4})); }), HasSubstr("[3, 4] and [5, 4]"));
  EXPECT_THAT(error_of([&] { ops::matmul(t({2, 3, 4}), t({3, 4, 5})); }), HasSubstr("[2, 3, 4] and [3, 4, 5]"));
}

}  // namespace
}  // namespace capstan::testing
