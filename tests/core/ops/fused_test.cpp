// Cases of the fused row ops against their plain compositions: norms, activations, rope, embedding, dropout.
#include "core/ops/harness.h"
#include "ops/gather.h"

#include <kernels/backend.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace capstan::testing {
namespace {

using Ins = std::span<const Tensor>;

std::vector<Case> norm_cases() {
  std::vector<Case> cases;
  struct Shape { std::int64_t rows, cols; };
  const auto both = [](const ops::NormOfSum& n) {
    const Tensor parts[] = {n.sum, n.y};
    return ops::concat(parts, 1);
  };
  for (auto [rows, cols] : {Shape{1, 1}, {3, 3}, {5, 17}, {31, 31}, {4, 33}, {65, 64}, {130, 65}, {3, 768}, {200, 129}}) {
    const std::string suffix = std::string("_") + std::to_string(rows) + "x" + std::to_string(cols);
    const Input x{{rows, cols}, -2, 3}, w{{cols}, 0.5, 1.5, false, true}, b{{cols}, -1, 1, false, true};
    const double epsilon = cols == 1 ? 0.5 : 1e-5;  // one column of layer_norm is 0 / sqrt(epsilon)
    cases.push_back({"rms_norm" + suffix, {x, w}, [epsilon](const Place&, Ins in) { return ops::rms_norm(in[0], in[1], epsilon); },
                     [epsilon](const Place&, Ins in) {
                       const Tensor square = ops::mean(ops::mul(in[0], in[0]), -1, true);
                       return ops::mul(ops::div(in[0], ops::sqrt(ops::scale(square, 1, epsilon))), in[1]);
                     }, true});
    const auto plain = [epsilon](Ins in) {
      const Tensor d = ops::sub(in[0], ops::mean(in[0], -1, true));
      const Tensor var = ops::mean(ops::mul(d, d), -1, true);
      return ops::mul(ops::div(d, ops::sqrt(ops::scale(var, 1, epsilon))), in[1]);
    };
    cases.push_back({"layer_norm" + suffix, {x, w, b}, [epsilon](const Place&, Ins in) { return ops::layer_norm(in[0], in[1], in[2], epsilon); },
                     [plain](const Place&, Ins in) { return ops::add(plain(in), in[2]); }, true});
    cases.push_back({"layer_norm_without_bias" + suffix, {x, w}, [epsilon](const Place&, Ins in) { return ops::layer_norm(in[0], in[1], {}, epsilon); },
                     [plain](const Place&, Ins in) { return plain(in); }, true});
  }
  for (auto [rows, cols] : {Shape{1, 1}, {5, 17}, {31, 64}, {130, 65}, {70, 768}}) {
    const std::string suffix = std::string("_") + std::to_string(rows) + "x" + std::to_string(cols);
    const Input x{{rows, cols}, -2, 3}, r{{rows, cols}, -1, 2}, w{{cols}, 0.5, 1.5, false, true}, b{{cols}, -1, 1, false, true};
    const double epsilon = cols == 1 ? 0.5 : 1e-5;
    const auto plain = [both, epsilon](const Tensor& sum, Ins weights) {
      if (weights.size() == 1) return both({sum, ops::rms_norm(sum, weights[0], epsilon)});
      return both({sum, ops::layer_norm(sum, weights[0], weights[1], epsilon)});
    };
    cases.push_back({"add_rms_norm" + suffix, {x, r, w}, [=](const Place&, Ins in) { return both(ops::add_rms_norm(in[0], in[1], in[2], epsilon)); },
                     [=](const Place&, Ins in) { return plain(ops::add(in[0], in[1]), in.subspan(2)); }, true});
    cases.push_back({"rms_norm_and_what_it_is_of" + suffix, {x, w}, [=](const Place&, Ins in) { return both(ops::add_rms_norm(in[0], {}, in[1], epsilon)); },
                     [=](const Place&, Ins in) { return plain(in[0], in.subspan(1)); }, true});
    cases.push_back({"add_layer_norm" + suffix, {x, r, w, b}, [=](const Place&, Ins in) { return both(ops::add_layer_norm(in[0], in[1], in[2], in[3], epsilon)); },
                     [=](const Place&, Ins in) { return plain(ops::add(in[0], in[1]), in.subspan(2)); }, true});
    cases.push_back({"layer_norm_and_what_it_is_of" + suffix, {x, w, b}, [=](const Place&, Ins in) { return both(ops::add_layer_norm(in[0], {}, in[1], in[2], epsilon)); },
                     [=](const Place&, Ins in) { return plain(in[0], in.subspan(1)); }, true});
  }
  const Input x{{7, 40}, -2, 3}, w{{40}, 0.5, 1.5, false};
  cases.push_back({"add_rms_norm_of_slices", {x, {{33}, 0.5, 1.5, false, true}}, [=](const Place&, Ins in) {
                     return both(ops::add_rms_norm(ops::slice(in[0], 1, 3, 33), ops::slice(in[0], 1, 0, 33), in[1], 1e-6));
                   }, {}, true});
  cases.push_back({"rms_norm_of_heads", {{{5, 3, 24}, -2, 3}, {{24}, 0.5, 1.5, false, true}},
                   [](const Place&, Ins in) { return ops::rms_norm(in[0], in[1], 1e-6); }, {}, true});
  cases.push_back({"rms_norm_with_a_computed_weight", {x, w}, [](const Place&, Ins in) { return ops::rms_norm(in[0], ops::exp(in[1]), 1e-6); }, {}, true});
  cases.push_back({"rms_norm_of_a_slice", {x, {{33}, 0.5, 1.5, false, true}},
                   [](const Place&, Ins in) { return ops::rms_norm(ops::slice(in[0], 1, 3, 33), in[1], 1e-6); }, {}, true});
  return cases;
}
CAPSTAN_OP_CASES(Norm, norm_cases());

TEST(NormOfSum, HasTheBitsOfTheNormOfTheRoundedSum) {
  auto device = tested_device(2);
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for (const std::int64_t cols : {1, 40, 768}) {
      const Tensor x = make(*device, random_values(9 * cols, 1), Dims{9, cols}, dtype), r = make(*device, random_values(9 * cols, 2), Dims{9, cols}, dtype);
      const Tensor w = make(*device, random_values(cols, 3), Dims{cols}, dtype), b = make(*device, random_values(cols, 4), Dims{cols}, dtype);
      const ops::NormOfSum rms = ops::add_rms_norm(x, r, w, 1e-5), layer = ops::add_layer_norm(x, r, w, b, 1e-5);
      const Tensor sum = ops::add(x, r);
      EXPECT_TRUE(same_bits(rms.sum, sum));
      EXPECT_TRUE(same_bits(layer.sum, sum));
      EXPECT_TRUE(same_bits(rms.y, ops::rms_norm(sum, w, 1e-5)));
      EXPECT_TRUE(same_bits(layer.y, ops::layer_norm(sum, w, b, 1e-5)));
      EXPECT_EQ(ops::add_rms_norm(x, {}, w, 1e-5).sum.raw(), x.raw()) << "nothing was added: nothing is copied";
    }
}

// Either result may be all that a model goes on with.
TEST(NormOfSum, HasTheGradientOfWhatIsUsed) {
  auto device = tested_device(2);
  const auto leaf = [&](std::uint64_t seed, const Dims& shape, bool parameter) {
    return make_leaf(make(*device, random_values(shape.product(), seed), shape, DType::f64), parameter);
  };
  const auto grad = [](const Tensor& t) { return doubles(static_cast<Leaf*>(t.node().get())->grad()); };
  const Tensor weights = make(*device, random_values(21, 9), Dims{3, 7}, DType::f64);
  Tensor x = leaf(1, {3, 7}, false), r = leaf(2, {3, 7}, false), w = leaf(3, {7}, true);
  int calls = 0;
  static_cast<Leaf*>(w.node().get())->hook = [&](Leaf&) { ++calls; };
  backward(ops::sum_all(ops::mul(ops::add_rms_norm(x, r, w, 1e-5).sum, weights)));
  EXPECT_EQ(grad(x), doubles(weights));
  EXPECT_EQ(grad(r), doubles(weights));
  EXPECT_EQ(grad(w), std::vector<double>(7, 0.0));
  EXPECT_EQ(calls, 1) << "the weight was used: its gradient, zero, is complete";

  x = leaf(1, {3, 7}, false), r = leaf(2, {3, 7}, false), w = leaf(3, {7}, true);
  backward(ops::sum_all(ops::mul(ops::add_rms_norm(x, r, w, 1e-5).y, weights)));
  const Tensor sum = make_leaf(ops::add(x.detach(), r.detach()), false), w2 = leaf(3, {7}, true);
  backward(ops::sum_all(ops::mul(ops::rms_norm(sum, w2, 1e-5), weights)));
  EXPECT_EQ(grad(x), grad(sum));
  EXPECT_EQ(grad(r), grad(sum));
  EXPECT_EQ(grad(w), grad(w2));
}

std::vector<Case> activation_cases() {
  std::vector<Case> cases;
  for (const Dims& shape : {Dims{1}, Dims{3, 17}, Dims{31, 33}, Dims{2, 3, 5}, Dims{160, 257}}) {
    const std::string suffix = std::string("_") + std::to_string(shape.product());
    const Input x{shape, -5, 5};
    cases.push_back({"gelu" + suffix, {x}, [](const Place&, Ins in) { return ops::gelu(in[0]); },
                     [](const Place&, Ins in) {
                       const Tensor cube = ops::mul(ops::mul(in[0], in[0]), in[0]);
                       const Tensor inner = ops::scale(ops::add(in[0], ops::scale(cube, 0.044715)), 0.79788456080286536);
                       return ops::mul(ops::scale(in[0], 0.5), ops::scale(ops::tanh(inner), 1, 1));
                     }, true});
    cases.push_back({"silu" + suffix, {x}, [](const Place&, Ins in) { return ops::silu(in[0]); },
                     [](const Place&, Ins in) { return ops::mul(in[0], ops::sigmoid(in[0])); }, true});
  }
  for (const Dims& shape : {Dims{1, 2}, Dims{3, 34}, Dims{5, 66}, Dims{31, 128}, Dims{130, 258}})
    cases.push_back({"swiglu_" + std::to_string(shape[1]), {{shape, -4, 4}}, [](const Place&, Ins in) { return ops::swiglu(in[0]); },
                     [](const Place&, Ins in) {
                       const std::int64_t f = in[0].size(1) / 2;
                       return ops::mul(ops::silu(ops::slice(in[0], 1, 0, f)), ops::slice(in[0], 1, f, f));
                     }, true});
  return cases;
}
CAPSTAN_OP_CASES(Activation, activation_cases());

std::vector<std::int32_t> ragged_positions(std::int64_t rows) {
  std::vector<std::int32_t> p;
  for (std::int64_t t = 0; t < rows; ++t) p.push_back(static_cast<std::int32_t>(t % 7 * 31 + t));
  return p;
}

std::vector<Case> rope_cases() {
  std::vector<Case> cases;
  struct Shape { std::int64_t rows, heads, size; };
  for (auto [rows, heads, size] : {Shape{1, 1, 2}, {3, 2, 6}, {5, 3, 34}, {17, 2, 64}, {65, 4, 80}}) {
    const std::vector<std::int32_t> at = ragged_positions(rows);
    const auto table = [at, size = size](const Place& s) {
      return ops::rope_table(s.rows(at), size, 10000, s.dtype == DType::f64 ? DType::f64 : DType::f32);
    };
    const auto plain = [table, size = size](const Place& s, Ins in) {
      const std::int64_t half = size / 2;
      const Tensor angles = table(s);
      const auto part = [&](std::int64_t begin) {
        return ops::reshape(ops::cast(ops::slice(angles, 1, begin, half), s.dtype), Dims{angles.size(0), 1, half});
      };
      const Tensor c = part(0), n = part(half), a = ops::slice(in[0], 2, 0, half), b = ops::slice(in[0], 2, half, half);
      const Tensor turned[] = {ops::sub(ops::mul(a, c), ops::mul(b, n)), ops::add(ops::mul(b, c), ops::mul(a, n))};
      return ops::concat(turned, 2);
    };
    cases.push_back({"rope_" + std::to_string(size), {{{rows, heads, size}}}, [table](const Place& s, Ins in) { return ops::rope(in[0], table(s)); }, plain, true});
    cases.push_back({"rope_flat_" + std::to_string(size), {{{rows, heads * size}}}, [table](const Place& s, Ins in) { return ops::rope(in[0], table(s)); }, {}, true});
  }
  const std::vector<std::int32_t> at = ragged_positions(9);
  cases.push_back({"rope_of_a_slice", {{{9, 5, 8}}}, [at](const Place& s, Ins in) {
                     const Tensor table = ops::rope_table(s.rows(at), 8, 500, s.dtype == DType::f64 ? DType::f64 : DType::f32);
                     return ops::rope(ops::slice(in[0], 1, 1, 3), table);
                   }, {}, true});
  return cases;
}
CAPSTAN_OP_CASES(Rope, rope_cases());

TEST(RopeTable, HoldsCosinesAndSinesOfF64Angles) {
  auto device = tested_device(2);
  const std::vector<std::int32_t> at = {0, 1, 5, 131071};
  const Place s{*device, DType::f32};
  const std::vector<double> got = doubles(ops::rope_table(s.whole(at), 8, 1e6, DType::f32));
  for (std::size_t t = 0; t < at.size(); ++t)
    for (std::size_t i = 0; i < 4; ++i) {
      const double angle = at[t] / std::pow(1e6, static_cast<double>(i) / 4);
      EXPECT_NEAR(got[t * 8 + i], std::cos(angle), 1e-7);
      EXPECT_NEAR(got[t * 8 + 4 + i], std::sin(angle), 1e-7);
    }
}

// The product of two turned vectors depends on the distance of their positions only.
TEST(Rope, ScoresDependOnDistance) {
  auto device = tested_device(1);
  const Place s{*device, DType::f64};
  const auto score = [&](std::int32_t i, std::int32_t j) {
    const Tensor table = ops::rope_table(s.whole(std::vector<std::int32_t>{i, j}), 16, 10000, DType::f64);
    const std::vector<double> y = doubles(ops::rope(make(*device, random_values(32, 5), Dims{2, 1, 16}, DType::f64), table));
    return std::inner_product(y.begin(), y.begin() + 16, y.begin() + 16, 0.0);
  };
  EXPECT_NEAR(score(3, 10), score(103, 110), 1e-12);
  EXPECT_GT(std::abs(score(3, 10) - score(3, 11)), 1e-6);
}

std::vector<Case> embedding_cases() {
  std::vector<Case> cases;
  for (bool parameter : {true, false})
    for (std::int64_t cols : {1, 3, 17, 33, 128}) {
      std::vector<std::int32_t> ids;
      for (int t = 0; t < 130; ++t) ids.push_back((t * t + 3) % 11);  // 12 rows: many repeats, some rows unused
      const Input table{{12, cols}, -1, 1, false, parameter};
      cases.push_back({std::string(parameter ? "embedding_" : "embedding_of_activation_") + std::to_string(cols), {table},
                       [ids](const Place& s, Ins in) { return ops::embedding(in[0], s.rows(ids)); },
                       [ids](const Place& s, Ins in) { return ops::gather(ops::scale(in[0], 1), s.rows(ids)); }});
    }
  return cases;
}
CAPSTAN_OP_CASES(Embedding, embedding_cases());

TEST(Embedding, AddsIntoAGradientThatIsThere) {
  auto device = tested_device(2);
  const Place s{*device, DType::f32};
  const Tensor table = make_leaf(make(*device, random_values(20, 1), Dims{5, 4}, DType::f32), true);
  auto* leaf = static_cast<Leaf*>(table.node().get());
  const Tensor buffer = Tensor::full(Dims{5, 4}, NAN, DType::f32, *device);
  leaf->set_buffer(buffer);  // its contents do not count
  const Tensor ids = s.whole(std::vector<std::int32_t>{1, 3, 1});
  for (int pass = 1; pass <= 2; ++pass) {
    backward(ops::sum_all(ops::embedding(table, ids)));
    std::vector<double> want(20, 0.0);
    for (int c = 0; c < 4; ++c) want[static_cast<std::size_t>(4 + c)] = 2 * pass, want[static_cast<std::size_t>(12 + c)] = pass;
    EXPECT_EQ(doubles(buffer), want) << "pass " << pass;
  }
  int calls = 0;
  leaf->clear();
  leaf->hook = [&](Leaf&) { ++calls; };
  const Tensor twice = ops::add(ops::sum_all(ops::embedding(table, ids)), ops::sum_all(ops::embedding(table, ids)));
  backward(twice);
  EXPECT_EQ(calls, 1);
}

TEST(Embedding, OfAPartOfTheTableLeavesOutWhatOthersHave) {
  auto device = tested_device(2);
  const Place s{*device, DType::f32};
  const std::vector<std::int32_t> all{4, 0, 3, -1, 6, 3, 5};
  const auto count = static_cast<std::int64_t>(all.size());
  const Tensor ids = s.whole(all), local = Tensor::full(Dims{count}, 77, DType::i32, *device);
  const Tensor mine = Tensor::full(Dims{count}, NAN, DType::f32, *device), others = Tensor::full(Dims{count}, NAN, DType::f32, *device);
  device->backend().local_ids(count, ids.data<std::int32_t>(), 3, 3, local.data<std::int32_t>(), kernels::Num::f32, mine.raw(), others.raw());
  EXPECT_EQ(doubles(local), (std::vector<double>{1, -1, 0, -1, -1, 0, 2}));
  EXPECT_EQ(doubles(mine), (std::vector<double>{1, 0, 1, 0, 0, 1, 1}));
  EXPECT_EQ(doubles(others), (std::vector<double>{0, 1, 0, 0, 1, 0, 0}));
  const Tensor table = make_leaf(make(*device, {1, 2, 3, 4, 5, 6}, Dims{3, 2}, DType::f32), true);
  const Tensor rows = ops::gather_checked("embedding", table, local);
  EXPECT_EQ(doubles(rows), (std::vector<double>{3, 4, 0, 0, 1, 2, 0, 0, 0, 0, 1, 2, 5, 6}));
  const Tensor roots[] = {rows}, grads[] = {make(*device, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, Dims{count, 2}, DType::f32)};
  backward(roots, grads);
  EXPECT_EQ(doubles(static_cast<Leaf*>(table.node().get())->grad()), (std::vector<double>{16, 18, 1, 2, 13, 14}));
}

TEST(Embedding, KeepsTheGradientOfABf16TableInF32) {
  auto device = tested_device(1);
  const Place s{*device, DType::bf16};
  const Tensor table = make_leaf(make(*device, random_values(6, 1), Dims{2, 3}, DType::bf16), true);
  backward(ops::sum_all(ops::embedding(table, s.whole(std::vector<std::int32_t>(1001, 1)))));
  const Tensor& g = static_cast<Leaf*>(table.node().get())->grad();
  EXPECT_EQ(g.dtype(), DType::f32);
  EXPECT_EQ(doubles(g), (std::vector<double>{0, 0, 0, 1001, 1001, 1001}));  // 1001 is no bf16 number
}

std::vector<std::int64_t> scattered_ids(std::int64_t rows) {
  std::vector<std::int64_t> ids;
  for (std::int64_t t = 0; t < rows; ++t) ids.push_back((t * 7919 + 13) % 100003 + (std::int64_t{1} << 33) * (t % 3));
  return ids;
}

std::vector<Case> dropout_cases() {
  std::vector<Case> cases;
  struct Shape { std::int64_t rows, cols; };
  for (auto [rows, cols] : {Shape{1, 1}, {3, 3}, {5, 17}, {31, 33}, {9, 64}, {2, 600}, {130, 257}})
    for (double p : {0.1, 0.5}) {
      const std::vector<std::int64_t> ids = scattered_ids(rows);
      const Rng rng(42, "dropout", 7);
      cases.push_back({"dropout_" + std::to_string(cols) + (p < 0.3 ? "_a" : "_b"), {{{rows, cols}}},
                       [ids, rng, p](const Place& s, Ins in) { return ops::dropout(in[0], p, rng, s.rows(ids)); },
                       [ids, rng, p, cols = cols](const Place& s, Ins in) {  // the same mask, one element at a time
                         std::vector<double> mask;
                         for (std::int64_t id : ids)
                           for (std::int64_t c = 0; c < cols; ++c)
                             mask.push_back(rng.uniform(static_cast<std::uint64_t>(id * cols + c)) >= p ? 1 / (1 - p) : 0);
                         return ops::mul(in[0], make(s.device, mask, in[0].shape(), s.dtype));
                       }, true});
    }
  return cases;
}
CAPSTAN_OP_CASES(Dropout, dropout_cases());

TEST(Dropout, DropsTheAskedShareAndDiffersByStepAndStream) {
  auto device = tested_device(2);
  const Place s{*device, DType::f32};
  const std::vector<std::int64_t> ids = scattered_ids(200);
  const Tensor ones = Tensor::full(Dims{200, 500}, 1, DType::f32, *device);
  std::set<std::vector<double>> masks;
  for (const Rng& rng : {Rng(1, "a", 0), Rng(1, "a", 1), Rng(1, "b", 0), Rng(2, "a", 0)}) {
    const std::vector<double> y = doubles(ops::dropout(ones, 0.3, rng, s.whole(ids)));
    const double kept = static_cast<double>(std::count_if(y.begin(), y.end(), [](double v) { return v != 0; })) / 1e5;
    EXPECT_NEAR(kept, 0.7, 5 * std::sqrt(0.21 / 1e5));
    masks.insert(y);
  }
  EXPECT_EQ(masks.size(), 4u);
  const Tensor x = make_leaf(ones, false);
  EXPECT_EQ(ops::dropout(x, 0, Rng(1, "a"), s.whole(ids)).node(), x.node());
}

}  // namespace
}  // namespace capstan::testing
