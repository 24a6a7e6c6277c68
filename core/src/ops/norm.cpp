// rms_norm and layer_norm over the last dimension, and the same of a sum that is kept. The graph keeps what was normalized and
// one or two numbers a row.
#include "ops/common.h"

#include <capstan/ops.h>

#include <algorithm>

namespace capstan::ops {

namespace {

void check_norm(const char* op, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double epsilon) {
  check_floating(op, "input", x);
  if (x.rank() == 0) wrong(op, "input's shape", "at least one dimension", to_string(x.shape()));
  check_floating(op, "weight", weight);
  check_device(op, "weight", weight, x);
  check_shape(op, "weight", weight, Dims{x.size(-1)});
  if (bias.defined()) {
    check_floating(op, "bias", bias);
    check_device(op, "bias", bias, x);
    check_shape(op, "bias", bias, Dims{x.size(-1)});
  }
  if (residual.defined()) {
    check_like(op, "residual", residual, x);
    check_shape(op, "residual", residual, x.shape());
  }
  if (!(epsilon >= 0)) wrong(op, "epsilon", "a number >= 0", std::to_string(epsilon));
}

// Weights are read in the compute type; they are one row.
Tensor wide(const Tensor& weight, const Tensor& x) {
  return weight.defined() ? weight.detach().to(compute_dtype(x.dtype())).contiguous() : Tensor();
}

void* pointer(const Tensor& t) { return t.defined() ? t.raw() : nullptr; }

// Room for the sums of each fixed block of rows.
Tensor partials(const Tensor& x) {
  const Rows r = rows_of(x);
  const std::int64_t blocks = x.is_meta() ? std::min<std::int64_t>((r.rows + 63) / 64, 256) : x.device().backend().norm_blocks(r.rows, r.cols);
  return Tensor::empty(Dims{blocks, r.cols}, compute_dtype(x.dtype()), x.device());
}

// The blocks' sums, added in order.
Tensor total(const Tensor& partial) {
  Tensor out = Tensor::empty(Dims{partial.size(1)}, partial.dtype(), partial.device());
  if (!partial.is_meta())
    partial.device().backend().sum_middle(num(partial), 1, partial.size(0), partial.size(1), partial.raw(), 1, num(out), out.raw());
  return out;
}

/// Inputs: x, weight, bias, residual. Outputs: y, or the sum and y.
class NormNode final : public Node {
 public:
  bool centre = false;
  Tensor x, weight, mean, inverse;  ///< x: what was normalized
  DType bias_dtype = DType::f32;
  std::string_view name() const override { return centre ? "layer_norm" : "rms_norm"; }
  void release() override { x = weight = mean = inverse = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(4);
    const bool want_x = wants(0, part) || wants(3, part), want_w = wants(1, part), want_b = wants(2, part);
    if (!want_x && !want_w && !want_b) return result;
    const Tensor g = grads.back().defined() ? incoming(grads.back(), x.dtype()) : Tensor::zeros(x.shape(), x.dtype(), x.device());
    const Tensor g_sum = outputs == 2 && want_x && grads[0].defined() ? incoming(grads[0], x.dtype()) : Tensor();
    const Rows r = rows_of(x);
    const Tensor dx = want_x ? Tensor::empty(x.shape(), x.dtype(), x.device()) : Tensor();
    const Tensor partial_w = want_w ? partials(x) : Tensor(), partial_b = want_b ? partials(x) : Tensor();
    run(x.device(), centre ? "layer_norm dx" : "rms_norm dx",
        {(centre ? 13 : 9) * real(x.numel()), real((g_sum.defined() ? 3 : 2) * x.bytes()), want_x ? real(x.bytes()) : 0}, [&](Backend& b) {
          const Tensor w = wide(weight, x);
          kernels::NormRowsBackward n{.centre = centre, .rows = r.rows, .cols = r.cols};
          n.x = x.raw(), n.w = w.raw(), n.mean = pointer(mean), n.inverse = inverse.raw(), n.g = g.raw(), n.g_sum = pointer(g_sum);
          n.dx = pointer(dx), n.partial_w = pointer(partial_w), n.partial_b = pointer(partial_b);
          b.norm_backward(num(x), n);
        });
    if (wants(0, part)) result[0] = dx;
    if (want_w) result[1] = outgoing(*this, 1, total(partial_w), weight.dtype());
    if (want_b) result[2] = outgoing(*this, 2, total(partial_b), bias_dtype);
    if (wants(3, part)) result[3] = dx;
    return result;
  }
};

/// y, and in `sum`, where it is not null, what was normalized.
Tensor norm(const char* op, bool centre, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double epsilon, Tensor* sum) {
  check_norm(op, x, residual, weight, bias, epsilon);
  const Tensor in = x.detach().contiguous(), more = residual.defined() ? residual.detach().contiguous() : Tensor();
  const Rows r = rows_of(x);
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  const Tensor mean = centre ? Tensor::empty(Dims{r.rows}, compute_dtype(x.dtype()), x.device()) : Tensor();
  const Tensor inverse = Tensor::empty(Dims{r.rows}, compute_dtype(x.dtype()), x.device());
  const Tensor normalized = more.defined() ? Tensor::empty(x.shape(), x.dtype(), x.device()) : in;
  const int passes = more.defined() ? 2 : 1;
  run(x.device(), more.defined() ? op : centre ? "layer_norm" : "rms_norm", {((centre ? 7 : 4) + passes - 1) * real(x.numel()), real(passes * x.bytes() + weight.bytes()), real(passes * x.bytes())}, [&](Backend& backend) {
    const Tensor w = wide(weight, x), b = wide(bias, x);
    kernels::NormRows n{.centre = centre, .rows = r.rows, .cols = r.cols, .epsilon = epsilon};
    n.x = in.raw(), n.w = w.raw(), n.b = pointer(b), n.residual = pointer(more), n.sum = more.defined() ? normalized.raw() : nullptr;
    n.y = y.raw(), n.mean = pointer(mean), n.inverse = inverse.raw();
    backend.norm(num(in), n);
  });
  if (sum != nullptr) *sum = more.defined() ? normalized.detach() : x.detach();
  if (any_requires_grad({&x, &weight, &bias, &residual})) {
    auto node = std::make_shared<NormNode>();
    node->centre = centre, node->x = normalized, node->weight = weight.detach(), node->mean = mean, node->inverse = inverse;
    if (bias.defined()) node->bias_dtype = bias.dtype();
    if (sum != nullptr) record(node, {&x, &weight, &bias, &residual}, {sum, &y});
    else record(node, {&x, &weight, &bias, &residual}, {&y});
  }
  return y;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) { return norm("rms_norm", false, x, {}, weight, {}, epsilon, nullptr); }

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  return norm("layer_norm", true, x, {}, weight, bias, epsilon, nullptr);
}

NormOfSum add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double epsilon) {
  NormOfSum result;
  result.y = norm("add_rms_norm", false, x, residual, weight, {}, epsilon, &result.sum);
  return result;
}

NormOfSum add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double epsilon) {
  NormOfSum result;
  result.y = norm("add_layer_norm", true, x, residual, weight, bias, epsilon, &result.sum);
  return result;
}

}  // namespace capstan::ops
