// softmax and log_softmax over the last dimension. Backwards read the saved output.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

const char* op_name(bool logarithm) { return logarithm ? "log_softmax" : "softmax"; }

class SoftmaxNode final : public Node {
 public:
  SoftmaxNode(Tensor y, bool logarithm) : y_(std::move(y)), logarithm_(logarithm) {}
  std::string_view name() const override { return op_name(logarithm_); }
  void release() override { y_ = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], y_.dtype());
    Tensor dx = Tensor::empty(g.shape(), g.dtype(), g.device());
    const Rows r = rows_of(g);
    run(g.device(), logarithm_ ? "log_softmax dx" : "softmax dx", {4 * real(g.numel()), 2 * real(g.bytes()), real(g.bytes())},
        [&](Backend& b) { b.softmax_backward(num(g), r.rows, r.cols, y_.raw(), g.raw(), dx.raw(), logarithm_); });
    return {dx};
  }

 private:
  Tensor y_;
  bool logarithm_;
};

Tensor rows_softmax(const Tensor& a, bool logarithm) {
  const char* op = op_name(logarithm);
  check_floating(op, "input", a);
  if (a.rank() == 0) wrong(op, "shape", "at least one dimension", to_string(a.shape()));
  const Tensor x = a.detach().contiguous();
  Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  const Rows r = rows_of(a);
  run(a.device(), op, {5 * real(a.numel()), real(a.bytes()), real(a.bytes())},
      [&](Backend& b) { b.softmax(num(x), r.rows, r.cols, x.raw(), y.raw(), logarithm); });
  if (any_requires_grad({&a})) record(std::make_shared<SoftmaxNode>(y, logarithm), {&a}, {&y});
  return y;
}

}  // namespace

Tensor softmax(const Tensor& a) { return rows_softmax(a, false); }
Tensor log_softmax(const Tensor& a) { return rows_softmax(a, true); }

}  // namespace capstan::ops
