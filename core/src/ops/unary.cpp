// scale, exp, log, sqrt, tanh, sigmoid: element by element. Backwards read the saved output, or the input where
// the output rounds away what the slope needs (1 - y near 1 in bf16).
#include "ops/common.h"

#include <capstan/ops.h>
#include <kernels/cpu/elementwise.h>

namespace capstan::ops {

namespace {

// f maps vectors; slope(v) is the derivative at the saved value.
template <class Slope>
class UnaryNode final : public Node {
 public:
  UnaryNode(const char* name, Tensor saved, Slope slope) : name_(name), saved_(std::move(saved)), slope_(slope) {}
  std::string_view name() const override { return name_; }
  void release() override { saved_ = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], saved_.dtype());
    Tensor dx = Tensor::empty(g.shape(), g.dtype(), g.device());
    run(g.device(), name_, {2 * real(g.numel()), 2 * real(g.bytes()), real(g.bytes())}, g.dtype(), [&]<class T>(cpu::Context& ctx) {
      cpu::map2(ctx, g.numel(), g.data<T>(), saved_.data<T>(), dx.data<T>(),
                [slope = slope_](auto grad, auto v) { return grad * slope(v); });
    });
    return {dx};
  }

 private:
  const char* name_;
  Tensor saved_;
  Slope slope_;
};

template <class F, class Slope>
Tensor unary(const char* op, const Tensor& a, bool save_output, F f, Slope slope) {
  check_floating(op, "input", a);
  const Tensor x = a.detach().contiguous();
  Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  run(a.device(), op, {real(a.numel()), real(a.bytes()), real(a.bytes())}, a.dtype(),
      [&]<class T>(cpu::Context& ctx) { cpu::map1(ctx, x.numel(), x.data<T>(), y.data<T>(), f); });
  if (any_requires_grad({&a})) record(std::make_shared<UnaryNode<Slope>>(op, save_output ? y : x, slope), {&a}, {&y});
  return y;
}

template <class V> V constant(V, double c) { return V(static_cast<typename V::Scalar>(c)); }

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
  run(a.device(), "scale", {2 * real(a.numel()), real(a.bytes()), real(a.bytes())}, a.dtype(), [&]<class T>(cpu::Context& ctx) {
    cpu::map1(ctx, x.numel(), x.data<T>(), y.data<T>(),
              [factor, shift](auto v) { return fma(v, constant(v, factor), constant(v, shift)); });
  });
  if (any_requires_grad({&a})) record(std::make_shared<ScaleNode>(factor), {&a}, {&y});
  return y;
}

Tensor exp(const Tensor& a) {
  return unary("exp", a, true, [](auto v) { return exp(v); }, [](auto y) { return y; });
}

Tensor log(const Tensor& a) {
  return unary("log", a, false, [](auto v) { return log(v); }, [](auto x) { return constant(x, 1) / x; });
}

Tensor sqrt(const Tensor& a) {
  return unary("sqrt", a, true, [](auto v) { return sqrt(v); }, [](auto y) { return constant(y, 0.5) / y; });
}

Tensor tanh(const Tensor& a) {
  return unary("tanh", a, false, [](auto v) { return tanh(v); }, [](auto x) {
    const auto y = tanh(x);
    return fma(-y, y, constant(y, 1));
  });
}

Tensor sigmoid(const Tensor& a) {
  return unary("sigmoid", a, false, [](auto v) { return sigmoid(v); }, [](auto x) { return sigmoid(x) * sigmoid(-x); });
}

}  // namespace capstan::ops
