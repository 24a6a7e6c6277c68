// add, sub, mul, div with broadcasting. A gradient is summed over the dimensions that were repeated.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

using kernels::BinaryOp;

constexpr const char* names[] = {"add", "sub", "mul", "div"};
const char* name_of_op(BinaryOp op) { return names[static_cast<int>(op)]; }

Dims broadcast_shape(const char* op, const Tensor& a, const Tensor& b) {
  const int rank = a.rank() > b.rank() ? a.rank() : b.rank();
  Dims shape;
  for (int d = 0; d < rank; ++d) {
    const int i = d - (rank - a.rank()), j = d - (rank - b.rank());
    const std::int64_t x = i < 0 ? 1 : a.shape()[i], y = j < 0 ? 1 : b.shape()[j];
    if (x != y && x != 1 && y != 1)
      wrong(op, "shapes", "two that are equal or 1 in each dimension from the right", to_string(a.shape()) + " and " + to_string(b.shape()));
    shape.push(x == 1 ? y : x);
  }
  return shape;
}

// The value alone, no graph.
Tensor apply(BinaryOp op, const Tensor& a, const Tensor& b) {
  const char* name = name_of_op(op);
  const Dims shape = broadcast_shape(name, a, b);
  Tensor out = Tensor::empty(shape, a.dtype(), a.device());
  run(a.device(), name, {real(out.numel()), real(a.bytes() + b.bytes()), real(out.bytes())}, [&](Backend& backend) {
    kernels::Broadcast plan;
    plan.rank = shape.size();
    for (int d = 0; d < plan.rank; ++d) {
      const int i = d - (plan.rank - a.rank()), j = d - (plan.rank - b.rank());
      plan.shape[d] = shape[d];
      plan.a[d] = i < 0 || a.shape()[i] == 1 ? 0 : a.strides()[i];
      plan.b[d] = j < 0 || b.shape()[j] == 1 ? 0 : b.strides()[j];
    }
    backend.binary(op, plan, num(a), a.raw(), b.raw(), out.raw());
  });
  return out;
}

class BinaryNode final : public Node {
 public:
  BinaryNode(BinaryOp op, const Tensor& a, const Tensor& b) : op_(op), dtype_(a.dtype()), a_shape_(a.shape()), b_shape_(b.shape()) {
    if (op == BinaryOp::mul || op == BinaryOp::div) a_ = a.detach(), b_ = b.detach();
  }
  std::string_view name() const override { return name_of_op(op_); }
  void release() override { a_ = b_ = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    const Tensor g = grads[0].detach();  // never written: equal shapes hand the same tensor to both inputs
    std::vector<Tensor> result(2);
    if (op_ == BinaryOp::add || op_ == BinaryOp::sub) {
      if (wants(0, part)) result[0] = fold(g, a_shape_);
      if (wants(1, part)) {
        result[1] = fold(g, b_shape_);
        if (op_ == BinaryOp::sub) result[1] = scale(result[1], -1);
      }
      return result;
    }
    // Products that are summed or divided again stay in the compute type until the end.
    const DType wide = compute_dtype(dtype_);
    const Tensor gw = g.to(wide);
    const Tensor a = a_.to(wide), b = b_.to(wide);
    if (op_ == BinaryOp::mul) {
      if (wants(0, part)) result[0] = fold(apply(BinaryOp::mul, gw, b), a_shape_);
      if (wants(1, part)) result[1] = fold(apply(BinaryOp::mul, gw, a), b_shape_);
    } else {  // d(a / b) = g / b, -(g / b)(a / b)
      const Tensor over = apply(BinaryOp::div, gw, b);
      if (wants(0, part)) result[0] = fold(over, a_shape_);
      if (wants(1, part)) result[1] = scale(fold(apply(BinaryOp::mul, over, apply(BinaryOp::div, a, b)), b_shape_), -1);
    }
    return result;
  }

 private:
  Tensor fold(const Tensor& g, const Dims& shape) const { return g.shape() == shape ? g.to(dtype_) : sum_to(g.to(compute_dtype(dtype_)), shape).to(dtype_); }
  BinaryOp op_;
  DType dtype_;
  Dims a_shape_, b_shape_;
  Tensor a_, b_;
};

Tensor binary(BinaryOp op, const Tensor& a, const Tensor& b) {
  check_floating(name_of_op(op), "first input", a);
  check_like(name_of_op(op), "second input", b, a);
  Tensor out = apply(op, a, b);
  if (any_requires_grad({&a, &b})) record(std::make_shared<BinaryNode>(op, a, b), {&a, &b}, {&out});
  return out;
}

}  // namespace

Tensor add(const Tensor& a, const Tensor& b) { return binary(BinaryOp::add, a, b); }
Tensor sub(const Tensor& a, const Tensor& b) { return binary(BinaryOp::sub, a, b); }
Tensor mul(const Tensor& a, const Tensor& b) { return binary(BinaryOp::mul, a, b); }
Tensor div(const Tensor& a, const Tensor& b) { return binary(BinaryOp::div, a, b); }

Tensor sum_to(const Tensor& t, const Dims& shape) {
  if (t.shape() == shape) return t;
  Tensor s = t.detach().contiguous();
  const int extra = s.rank() - shape.size();
  // Neighbouring repeated dimensions are summed as one, outermost first.
  for (int d = 0; d < t.rank();) {
    const auto repeated = [&](int i) { return i < extra || (shape[i - extra] == 1 && t.shape()[i] != 1); };
    if (!repeated(d)) {
      ++d;
      continue;
    }
    int end = d;
    std::int64_t n = 1, outer = 1, inner = 1;
    while (end < t.rank() && repeated(end)) n *= t.shape()[end++];
    for (int i = 0; i < d; ++i) outer *= s.shape()[i];
    for (int i = end; i < t.rank(); ++i) inner *= s.shape()[i];
    Dims to = s.shape();
    for (int i = d; i < end; ++i) to[i] = 1;
    Tensor out = Tensor::empty(to, s.dtype(), s.device());
    run(s.device(), "sum", {real(s.numel()), real(s.bytes()), real(out.bytes())},
        [&](Backend& b) { b.sum_middle(num(s), outer, n, inner, s.raw(), 1, num(out), out.raw()); });
    s = out;
    d = end;
  }
  return s.view(shape);
}

}  // namespace capstan::ops
