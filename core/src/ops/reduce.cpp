// sum, mean, max and running sums over one dimension, and sum_all.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

struct Middle {
  std::int64_t outer = 1, n = 1, inner = 1;
  Middle(const Dims& shape, int dim) : n(shape[dim]) {
    for (int i = 0; i < dim; ++i) outer *= shape[i];
    for (int i = dim + 1; i < shape.size(); ++i) inner *= shape[i];
  }
};

Dims without(const Dims& shape, int dim, bool keep) {
  Dims out;
  for (int i = 0; i < shape.size(); ++i)
    if (i != dim) out.push(shape[i]);
    else if (keep) out.push(1);
  return out;
}

class SumNode final : public Node {
 public:
  SumNode(const char* name, const Dims& shape, int dim, DType dtype, double factor)
      : name_(name), shape_(shape), dim_(dim), dtype_(dtype), factor_(factor) {}
  std::string_view name() const override { return name_; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], dtype_);
    Tensor dx = Tensor::empty(shape_, dtype_, g.device());
    const Middle m(shape_, dim_);
    run(g.device(), name_, {real(dx.numel()), real(g.bytes()), real(dx.bytes())},
        [&](Backend& b) { b.spread_middle(num(g), m.outer, m.n, m.inner, g.raw(), factor_, dx.raw()); });
    return {dx};
  }

 private:
  const char* name_;
  Dims shape_;
  int dim_;
  DType dtype_;
  double factor_;
};

Tensor sum_scaled(const char* op, const Tensor& a, int dim, bool keep, bool averaged) {
  check_floating(op, "input", a);
  const int d = dimension(op, a, dim);
  const Middle m(a.shape(), d);
  const double factor = averaged ? 1.0 / real(m.n) : 1.0;
  const Tensor x = a.detach().contiguous();
  Tensor out = Tensor::empty(without(a.shape(), d, keep), a.dtype(), a.device());
  run(a.device(), op, {real(a.numel()), real(a.bytes()), real(out.bytes())},
      [&](Backend& b) { b.sum_middle(num(x), m.outer, m.n, m.inner, x.raw(), factor, num(out), out.raw()); });
  if (any_requires_grad({&a})) record(std::make_shared<SumNode>(op, a.shape(), d, a.dtype(), factor), {&a}, {&out});
  return out;
}

class MaxNode final : public Node {
 public:
  MaxNode(Tensor x, Tensor y, int dim) : x_(std::move(x)), y_(std::move(y)), dim_(dim) {}
  std::string_view name() const override { return "max"; }
  void release() override { x_ = y_ = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], x_.dtype());
    Tensor dx = Tensor::empty(x_.shape(), x_.dtype(), x_.device());
    const Middle m(x_.shape(), dim_);
    run(g.device(), "max dx", {real(x_.numel()), real(x_.bytes() + 2 * g.bytes()), real(dx.bytes())},
        [&](Backend& b) { b.max_middle_backward(num(g), m.outer, m.n, m.inner, x_.raw(), y_.raw(), g.raw(), dx.raw()); });
    return {dx};
  }

 private:
  Tensor x_, y_;
  int dim_;
};

/// Running sums of x along dim; from the end when `reverse`.
Tensor running_sum(const char* name, const Tensor& x, int dim, bool reverse) {
  const Middle m(x.shape(), dim);
  Tensor out = Tensor::empty(x.shape(), x.dtype(), x.device());
  run(x.device(), name, {real(x.numel()), real(x.bytes()), real(out.bytes())},
      [&](Backend& b) { b.scan_middle(num(x), m.outer, m.n, m.inner, x.raw(), reverse, out.raw()); });
  return out;
}

class CumsumNode final : public Node {
 public:
  CumsumNode(DType dtype, int dim) : dtype_(dtype), dim_(dim) {}
  std::string_view name() const override { return "cumsum"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {running_sum("cumsum dx", incoming(grads[0], dtype_), dim_, true)};
  }

 private:
  DType dtype_;
  int dim_;
};

class SumAllNode final : public Node {
 public:
  SumAllNode(const Dims& shape, DType dtype) : shape_(shape), dtype_(dtype) {}
  std::string_view name() const override { return "sum_all"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], dtype_);
    Tensor dx = Tensor::empty(shape_, dtype_, g.device());
    run(g.device(), "sum_all dx", {0, real(g.bytes()), real(dx.bytes())},
        [&](Backend& b) { b.spread_middle(num(g), 1, dx.numel(), 1, g.raw(), 1, dx.raw()); });
    return {dx};
  }

 private:
  Dims shape_;
  DType dtype_;
};

}  // namespace

Tensor sum(const Tensor& a, int dim, bool keep) { return sum_scaled("sum", a, dim, keep, false); }
Tensor mean(const Tensor& a, int dim, bool keep) { return sum_scaled("mean", a, dim, keep, true); }

Tensor max(const Tensor& a, int dim, bool keep) {
  check_floating("max", "input", a);
  const int d = dimension("max", a, dim);
  const Middle m(a.shape(), d);
  if (m.n == 0) wrong("max", "extent of dimension " + std::to_string(dim), "at least 1", to_string(a.shape()));
  const Tensor x = a.detach().contiguous();
  Tensor out = Tensor::empty(without(a.shape(), d, keep), a.dtype(), a.device());
  run(a.device(), "max", {real(a.numel()), real(a.bytes()), real(out.bytes())},
      [&](Backend& b) { b.max_middle(num(x), m.outer, m.n, m.inner, x.raw(), out.raw()); });
  if (any_requires_grad({&a})) record(std::make_shared<MaxNode>(x, out, d), {&a}, {&out});
  return out;
}

Tensor cumsum(const Tensor& a, int dim) {
  check_floating("cumsum", "input", a);
  const int d = dimension("cumsum", a, dim);
  Tensor out = running_sum("cumsum", a.detach().contiguous(), d, false);
  if (any_requires_grad({&a})) record(std::make_shared<CumsumNode>(a.dtype(), d), {&a}, {&out});
  return out;
}

Tensor sum_all(const Tensor& a) {
  check_floating("sum_all", "input", a);
  const Tensor x = a.detach().contiguous();
  Tensor out = Tensor::empty(Dims{}, a.dtype(), a.device());
  run(a.device(), "sum_all", {real(a.numel()), real(a.bytes()), real(out.bytes())},
      [&](Backend& b) { b.sum_flat(num(x), x.numel(), x.raw(), out.raw()); });
  if (any_requires_grad({&a})) record(std::make_shared<SumAllNode>(a.shape(), a.dtype()), {&a}, {&out});
  return out;
}

}  // namespace capstan::ops
