// gelu, silu, swiglu. Backwards recompute from the saved input: nothing else is kept.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

using kernels::UnaryOp;

class GeluNode final : public Node {
 public:
  Tensor x;
  std::string_view name() const override { return "gelu"; }
  void release() override { x = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], x.dtype());
    Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
    run(x.device(), "gelu dx", {20 * real(x.numel()), 2 * real(x.bytes()), real(x.bytes())}, [&](Backend& b) { b.unary_backward(UnaryOp::gelu, num(x), x.numel(), x.raw(), g.raw(), dx.raw()); });
    return {dx};
  }
};

class SiluNode final : public Node {
 public:
  Tensor x;
  std::string_view name() const override { return "silu"; }
  void release() override { x = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], x.dtype());
    Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
    run(x.device(), "silu dx", {15 * real(x.numel()), 2 * real(x.bytes()), real(x.bytes())}, [&](Backend& b) { b.unary_backward(UnaryOp::silu, num(x), x.numel(), x.raw(), g.raw(), dx.raw()); });
    return {dx};
  }
};

class SwigluNode final : public Node {
 public:
  Tensor gate_up;
  std::string_view name() const override { return "swiglu"; }
  void release() override { gate_up = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], gate_up.dtype());
    Tensor dx = Tensor::empty(gate_up.shape(), gate_up.dtype(), gate_up.device());
    const Rows r = rows_of(g);
    run(g.device(), "swiglu dx", {18 * real(g.numel()), real(g.bytes() + dx.bytes()), real(dx.bytes())},
        [&](Backend& b) { b.swiglu_backward(num(g), r.rows, r.cols, gate_up.raw(), g.raw(), dx.raw()); });
    return {dx};
  }
};

}  // namespace

Tensor gelu(const Tensor& x) {
  check_floating("gelu", "input", x);
  const Tensor in = x.detach().contiguous();
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  run(x.device(), "gelu", {14 * real(x.numel()), real(x.bytes()), real(x.bytes())}, [&](Backend& b) { b.unary(UnaryOp::gelu, num(in), in.numel(), in.raw(), y.raw()); });
  if (any_requires_grad({&x})) {
    auto node = std::make_shared<GeluNode>();
    node->x = in;
    record(node, {&x}, {&y});
  }
  return y;
}

Tensor silu(const Tensor& x) {
  check_floating("silu", "input", x);
  const Tensor in = x.detach().contiguous();
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  run(x.device(), "silu", {10 * real(x.numel()), real(x.bytes()), real(x.bytes())}, [&](Backend& b) { b.unary(UnaryOp::silu, num(in), in.numel(), in.raw(), y.raw()); });
  if (any_requires_grad({&x})) {
    auto node = std::make_shared<SiluNode>();
    node->x = in;
    record(node, {&x}, {&y});
  }
  return y;
}

Tensor swiglu(const Tensor& gate_up) {
  check_floating("swiglu", "gate_up", gate_up);
  if (gate_up.rank() == 0 || gate_up.size(-1) % 2 != 0) wrong("swiglu", "gate_up's shape", "[T, 2F]", to_string(gate_up.shape()));
  const Tensor in = gate_up.detach().contiguous();
  Dims shape = gate_up.shape();
  shape[shape.size() - 1] /= 2;
  Tensor y = Tensor::empty(shape, in.dtype(), in.device());
  const Rows r = rows_of(y);
  run(in.device(), "swiglu", {11 * real(y.numel()), real(in.bytes()), real(y.bytes())},
      [&](Backend& b) { b.swiglu(num(in), r.rows, r.cols, in.raw(), y.raw()); });
  if (any_requires_grad({&gate_up})) {
    auto node = std::make_shared<SwigluNode>();
    node->gate_up = in;
    record(node, {&gate_up}, {&y});
  }
  return y;
}

}  // namespace capstan::ops
