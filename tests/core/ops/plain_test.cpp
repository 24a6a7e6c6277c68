// Cases of the plain ops: arithmetic with broadcasting, element functions, reductions, softmax, shapes.
#include "core/ops/harness.h"

#include <cmath>

namespace capstan::testing {
namespace {

using Ins = std::span<const Tensor>;

std::vector<Case> binary_cases() {
  struct Pair { const char* name; Dims a, b; };
  const std::vector<Pair> pairs = {
      {"equal", {3, 17}, {3, 17}},      {"one", {1}, {1}},          {"bias", {5, 33}, {33}},   {"column", {7, 31}, {7, 1}},
      {"outer", {9, 1}, {1, 5}},        {"scalar", {3, 5}, {}},     {"left", {17}, {3, 17}},   {"middle", {2, 3, 1, 5}, {3, 4, 1}},
      {"large", {130, 257}, {130, 257}}, {"large_bias", {300, 129}, {129}},
  };
  using Op = Tensor (*)(const Tensor&, const Tensor&);
  const std::vector<std::pair<const char*, Op>> functions = {{"add", ops::add}, {"sub", ops::sub}, {"mul", ops::mul}, {"div", ops::div}};
  std::vector<Case> cases;
  for (auto [name, f] : functions)
    for (const Pair& p : pairs) {
      const bool rows = p.a.size() == 2 && p.b.size() >= 1 && p.b[0] != 1 && std::string(p.name) != "left";
      const bool b_rows = p.b.size() == p.a.size();
      cases.push_back({std::string(name) + "_" + p.name,
                       {{p.a, -2, 2, true}, {p.b, 0.5, 2, b_rows}},
                       [f = f](const Place&, Ins x) { return f(x[0], x[1]); },
                       {},
                       rows});
    }
  // An operand twice, and strided operands.
  cases.push_back({"mul_itself", {{{3, 17}}}, [](const Place&, Ins x) { return ops::mul(x[0], x[0]); }, {}, true});
  cases.push_back({"add_itself", {{{3, 17}}}, [](const Place&, Ins x) { return ops::add(x[0], x[0]); }, {}, true});
  cases.push_back({"add_transposed", {{{5, 7}}, {{7, 5}}}, [](const Place&, Ins x) { return ops::add(x[0], ops::transpose(x[1], 0, 1)); }, {}});
  cases.push_back({"mul_slices", {{{6, 9}}}, [](const Place&, Ins x) {
                     return ops::mul(ops::slice(x[0], 1, 1, 4), ops::slice(x[0], 1, 5, 4));
                   }, {}, true});
  return cases;
}
CAPSTAN_OP_CASES(Binary, binary_cases());

std::vector<Case> unary_cases() {
  struct One { const char* name; double low, high; Tensor (*f)(const Tensor&); };
  const std::vector<One> functions = {
      {"scale", -2, 2, [](const Tensor& a) { return ops::scale(a, -1.5, 0.25); }},
      {"exp", -3, 3, [](const Tensor& a) { return ops::exp(a); }},
      {"log", 0.2, 5, [](const Tensor& a) { return ops::log(a); }},
      {"sqrt", 0.2, 5, [](const Tensor& a) { return ops::sqrt(a); }},
      {"tanh", -3, 3, [](const Tensor& a) { return ops::tanh(a); }},
      {"sigmoid", -6, 6, [](const Tensor& a) { return ops::sigmoid(a); }},
  };
  std::vector<Case> cases;
  for (const One& one : functions)
    for (const Dims& shape : {Dims{1}, Dims{3, 17}, Dims{31}, Dims{5, 33}, Dims{65, 2, 3}, Dims{150, 333}})
      cases.push_back({std::string(one.name) + "_" + std::to_string(shape.product()),
                       {{shape, one.low, one.high}},
                       [f = one.f](const Place&, Ins x) { return f(x[0]); },
                       {},
                       true});
  return cases;
}
CAPSTAN_OP_CASES(Unary, unary_cases());

std::vector<Case> reduce_cases() {
  std::vector<Case> cases;
  struct Shape { const char* name; Dims shape; int dim; };
  const std::vector<Shape> shapes = {{"row", {5, 33}, 1},       {"column", {65, 17}, 0},   {"middle", {3, 7, 5}, 1}, {"last", {2, 3, 130}, -1},
                                     {"single", {1, 1}, 0},     {"vector", {31}, 0},       {"tall", {700, 63}, 0},   {"wide", {300, 129}, 1}};
  for (const Shape& s : shapes) {
    const bool rows = s.dim != 0 && s.shape.size() > 1;
    for (bool keep : {false, true}) {
      const std::string suffix = std::string("_") + s.name + (keep ? "_keep" : "");
      cases.push_back({"sum" + suffix, {{s.shape}}, [d = s.dim, keep](const Place&, Ins x) { return ops::sum(x[0], d, keep); }, {}, rows});
      cases.push_back({"mean" + suffix, {{s.shape}}, [d = s.dim, keep](const Place&, Ins x) { return ops::mean(x[0], d, keep); }, {}, rows});
      cases.push_back({"max" + suffix, {{s.shape, -50, 50}}, [d = s.dim, keep](const Place&, Ins x) { return ops::max(x[0], d, keep); }, {}, rows});
    }
  }
  for (const Shape& s : shapes) {
    const int d = s.dim < 0 ? s.dim + static_cast<int>(s.shape.size()) : s.dim;
    cases.push_back({std::string("cumsum_") + s.name, {{s.shape}}, [d = s.dim](const Place&, Ins x) { return ops::cumsum(x[0], d); },
                     [d](const Place&, Ins x) {
                       std::vector<Tensor> sums;
                       for (std::int64_t i = 0; i < x[0].size(d); ++i) sums.push_back(ops::sum(ops::slice(x[0], d, 0, i + 1), d, true));
                       return ops::concat(sums, d);
                     }, s.dim != 0 && s.shape.size() > 1});
  }
  for (std::int64_t n : {1, 17, 4095, 4097, 70000})
    cases.push_back({"sum_all_" + std::to_string(n), {{{n}}}, [](const Place&, Ins x) { return ops::sum_all(x[0]); }, {}});
  return cases;
}
CAPSTAN_OP_CASES(Reduce, reduce_cases());

Tensor plain_softmax(const Tensor& x) {
  const Tensor e = ops::exp(ops::sub(x, ops::max(x, -1, true)));
  return ops::div(e, ops::sum(e, -1, true));
}

std::vector<Case> softmax_cases() {
  std::vector<Case> cases;
  for (const Dims& shape : {Dims{1, 1}, Dims{3, 17}, Dims{31, 16}, Dims{2, 3, 65}, Dims{90, 257}}) {
    const std::string suffix = std::string("_") + std::to_string(shape[shape.size() - 1]);
    cases.push_back({"softmax" + suffix, {{shape, -4, 4}}, [](const Place&, Ins x) { return ops::softmax(x[0]); },
                     [](const Place&, Ins x) { return plain_softmax(x[0]); }, true});
    cases.push_back({"log_softmax" + suffix, {{shape, -4, 4}}, [](const Place&, Ins x) { return ops::log_softmax(x[0]); },
                     [](const Place&, Ins x) { return ops::log(plain_softmax(x[0])); }, true});
  }
  return cases;
}
CAPSTAN_OP_CASES(Softmax, softmax_cases());

std::vector<Case> shape_cases() {
  const std::vector<std::int32_t> ids = {2, 0, 2, 6, 2, 5, 0};
  return {
      {"reshape", {{{6, 5}}}, [](const Place&, Ins x) { return ops::reshape(x[0], Dims{3, 2, 5}); }, {}},
      {"reshape_open", {{{6, 5}}}, [](const Place&, Ins x) { return ops::reshape(x[0], Dims{-1, 3}); }, {}},
      {"reshape_of_strided", {{{6, 5}}}, [](const Place&, Ins x) { return ops::reshape(ops::transpose(x[0], 0, 1), Dims{30}); }, {}},
      {"transpose", {{{3, 5, 7}}}, [](const Place&, Ins x) { return ops::transpose(x[0], 0, 2); }, {}},
      {"transpose_twice", {{{3, 5, 7}}}, [](const Place&, Ins x) { return ops::transpose(ops::transpose(x[0], 0, -1), 1, 2); }, {}},
      {"slice_rows", {{{9, 5}}}, [](const Place&, Ins x) { return ops::slice(x[0], 0, 2, 5); }, {}},
      {"slice_columns", {{{9, 5}}}, [](const Place&, Ins x) { return ops::slice(x[0], -1, 1, 3); }, {}, true},
      {"slice_middle", {{{3, 9, 5}}}, [](const Place&, Ins x) { return ops::slice(x[0], 1, 8, 1); }, {}, true},
      {"slice_then_exp", {{{9, 40}}}, [](const Place&, Ins x) { return ops::exp(ops::slice(x[0], 1, 3, 33)); }, {}, true},
      {"concat_rows", {{{2, 5}}, {{3, 5}}, {{1, 5}}}, [](const Place&, Ins x) { return ops::concat(x, 0); }, {}},
      {"concat_columns", {{{4, 5}}, {{4, 1}}, {{4, 3}}}, [](const Place&, Ins x) { return ops::concat(x, 1); }, {}, true},
      {"split_and_join", {{{4, 9}}}, [](const Place&, Ins x) {
         const std::int64_t widths[] = {2, 4, 3};
         const std::vector<Tensor> p = ops::split(x[0], widths);
         const Tensor back[] = {p[2], ops::exp(p[0])};  // the middle piece is unused: its gradient is zero
         return ops::concat(back, 1);
       }, {}, true},
      {"gather", {{{7, 5}, -1, 1, false}}, [ids](const Place& s, Ins x) { return ops::gather(x[0], s.rows(ids)); }, {}},
      {"gather_vector", {{{7}, -1, 1, false}}, [ids](const Place& s, Ins x) { return ops::gather(x[0], s.rows(ids)); }, {}},
      {"gather_of_activation", {{{7, 2, 3}, -1, 1, false}}, [ids](const Place& s, Ins x) { return ops::gather(ops::exp(x[0]), s.rows(ids)); }, {}},
      {"reuse", {{{3, 17}}}, [](const Place&, Ins x) {
         const Tensor a = ops::exp(x[0]);
         return ops::add(ops::mul(a, a), ops::add(a, ops::tanh(a)));
       }, {}, true},
  };
}
CAPSTAN_OP_CASES(Shape, shape_cases());

TEST(Cast, GoesForwardAndBack) {
  auto device = tested_device(1);
  const Tensor x = make_leaf(make(*device, {1.0, 1.00390625, -3.14159, 0.1}, Dims{4}, DType::f32), false);
  const Tensor y = ops::cast(x, DType::bf16);
  EXPECT_EQ(y.dtype(), DType::bf16);
  EXPECT_EQ(doubles(y), (std::vector<double>{1, 1, -3.140625, 0.10009765625}));  // ties go to the even neighbour
  const Tensor roots[] = {y}, grads[] = {make(*device, {1, 2, 3, 4}, Dims{4}, DType::bf16)};
  backward(roots, grads);
  const Tensor& g = static_cast<Leaf*>(x.node().get())->grad();
  EXPECT_EQ(g.dtype(), DType::f32);
  EXPECT_EQ(doubles(g), (std::vector<double>{1, 2, 3, 4}));
  EXPECT_EQ(ops::cast(x, DType::f32).node(), x.node());
}

TEST(Max, TakesTheFirstOfEqualsAndKeepsNaN) {
  auto device = tested_device(1);
  const Tensor x = make_leaf(make(*device, {1, 5, 5, 2, 5, 0}, Dims{2, 3}, DType::f32), false);
  const Tensor roots[] = {ops::max(x, 1)}, grads[] = {make(*device, {7, 9}, Dims{2}, DType::f32)};
  backward(roots, grads);
  EXPECT_EQ(doubles(static_cast<Leaf*>(x.node().get())->grad()), (std::vector<double>{0, 7, 0, 0, 9, 0}));
  EXPECT_TRUE(std::isnan(doubles(ops::max(make(*device, {1, NAN, 3}, Dims{3}, DType::f32), 0))[0]));
}

TEST(Softmax, HoldsLargeAndMissingLogits) {
  auto device = tested_device(1);
  const double inf = INFINITY;
  const Tensor y = ops::softmax(make(*device, {1e30, 0, -inf, 5000, 5000, -inf}, Dims{2, 3}, DType::f32));
  EXPECT_EQ(doubles(y), (std::vector<double>{1, 0, 0, 0.5, 0.5, 0}));
  const std::vector<double> l = doubles(ops::log_softmax(make(*device, {5000, 5000, 0}, Dims{3}, DType::f32)));
  EXPECT_NEAR(l[0], -std::log(2.0), 1e-3);
  EXPECT_NEAR(l[2], -5000 - std::log(2.0), 1e-2);
}

TEST(Add, HandsTheSameGradientToBothWithoutACopy) {
  auto device = tested_device(1);
  const Tensor a = make_leaf(make(*device, {1, 2}, Dims{2}, DType::f32), false), b = make_leaf(make(*device, {3, 4}, Dims{2}, DType::f32), false);
  const Tensor g = make(*device, {5, 6}, Dims{2}, DType::f32);
  const Tensor roots[] = {ops::add(a, b)}, grads[] = {g};
  backward(roots, grads);
  EXPECT_EQ(static_cast<Leaf*>(a.node().get())->grad().raw(), g.raw());
  EXPECT_EQ(static_cast<Leaf*>(b.node().get())->grad().raw(), g.raw());
}

}  // namespace
}  // namespace capstan::testing
