// scale, exp, log, sqrt, tanh, sigmoid: element by element. Backwards read the saved output, or the input where
// the output rounds away what the slope needs (1 - y near 1 in bf16).
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

using kernels::UnaryOp;

class UnaryNode final : public Node {
 public:
  UnaryNode(const char* name, UnaryOp op, Tensor saved) : name_(name), op_(op), saved_(std::move(saved)) {}
  std::string_view name() const override { return name_; }
  void release() override { saved_ = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], saved_.dtype());
    Tensor dx = Tensor::empty(g.shape(), g.dtype(), g.device());
    run(g.device(), name_, {2 * real(g.numel()), 2 * real(g.bytes()), real(g.bytes())},
        [&](Backend& b) { b.unary_backward(op_, num(g), g.numel(), saved_.raw(), g.raw(), dx.raw()); });
    return {dx};
  }

 private:
  const char* name_;
  UnaryOp op_;
  Tensor saved_;
};

Tensor unary(const char* name, UnaryOp op, const Tensor& a, bool save_output) {
  check_floating(name, "input", a);
  const Tensor x = a.detach().contiguous();
  Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  run(a.device(), name, {real(a.numel()), real(a.bytes()), real(a.bytes())},
      [&](Backend& b) { b.unary(op, num(x), x.numel(), x.raw(), y.raw()); });
  if (any_requires_grad({&a})) record(std::make_shared<UnaryNode>(name, op, save_output ? y : x), {&a}, {&y});
  return y;
}

// d(a * factor + shift) = factor: needs no saved value.
class ScaleNode final : public Node {
 public:
  explicit ScaleNode(double factor) : factor_(factor) {}
  std::string_view name() const override { return "scale"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {scale(grads[0].detach(), factor_)};
  }

 private:
  double factor_;
};

}  // namespace

Tensor scale(const Tensor& a, double factor, double shift) {
  check_floating("scale", "input", a);
  const Tensor x = a.detach().contiguous();
  Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  run(a.device(), "scale", {2 * real(a.numel()), real(a.bytes()), real(a.bytes())},
      [&](Backend& b) { b.scale(num(x), x.numel(), x.raw(), factor, shift, y.raw()); });
  if (any_requires_grad({&a})) record(std::make_shared<ScaleNode>(factor), {&a}, {&y});
  return y;
}

Tensor exp(const Tensor& a) { return unary("exp", UnaryOp::exp, a, true); }
Tensor log(const Tensor& a) { return unary("log", UnaryOp::log, a, false); }
Tensor sqrt(const Tensor& a) { return unary("sqrt", UnaryOp::sqrt, a, true); }
Tensor tanh(const Tensor& a) { return unary("tanh", UnaryOp::tanh, a, false); }
Tensor sigmoid(const Tensor& a) { return unary("sigmoid", UnaryOp::sigmoid, a, false); }

}  // namespace capstan::ops
