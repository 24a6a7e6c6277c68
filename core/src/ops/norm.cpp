// rms_norm and layer_norm over the last dimension. The graph keeps the input and one or two numbers a row.
#include "ops/common.h"

#include <capstan/ops.h>

#include <algorithm>

namespace capstan::ops {

namespace {

void check_norm(const char* op, const Tensor& x, const Tensor& weight, double epsilon) {
  check_floating(op, "input", x);
  if (x.rank() == 0) wrong(op, "input's shape", "at least one dimension", to_string(x.shape()));
  check_floating(op, "weight", weight);
  check_device(op, "weight", weight, x);
  check_shape(op, "weight", weight, Dims{x.size(-1)});
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

class RmsNormNode final : public Node {
 public:
  Tensor x, weight, inverse;
  std::string_view name() const override { return "rms_norm"; }
  void release() override { x = weight = inverse = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(2);
    const bool want_x = wants(0, part), want_w = wants(1, part);
    if (!want_x && !want_w) return result;
    const Tensor g = incoming(grads[0], x.dtype());
    const Rows r = rows_of(x);
    if (want_x) result[0] = Tensor::empty(x.shape(), x.dtype(), x.device());
    const Tensor partial = want_w ? partials(x) : Tensor();
    run(x.device(), "rms_norm dx", {9 * real(x.numel()), 2 * real(x.bytes()), want_x ? real(x.bytes()) : 0},
        [&](Backend& b) {
          const Tensor w = wide(weight, x);
          b.rms_norm_backward(num(x), r.rows, r.cols, x.raw(), w.raw(), inverse.raw(), g.raw(), pointer(result[0]), pointer(partial));
        });
    if (want_w) result[1] = outgoing(*this, 1, total(partial), weight.dtype());
    return result;
  }
};

class LayerNormNode final : public Node {
 public:
  Tensor x, weight, mean, inverse;
  DType bias_dtype = DType::f32;
  std::string_view name() const override { return "layer_norm"; }
  void release() override { x = weight = mean = inverse = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(3);
    const bool want_x = wants(0, part), want_w = wants(1, part), want_b = wants(2, part);
    if (!want_x && !want_w && !want_b) return result;
    const Tensor g = incoming(grads[0], x.dtype());
    const Rows r = rows_of(x);
    if (want_x) result[0] = Tensor::empty(x.shape(), x.dtype(), x.device());
    const Tensor partial_w = want_w ? partials(x) : Tensor(), partial_b = want_b ? partials(x) : Tensor();
    run(x.device(), "layer_norm dx", {13 * real(x.numel()), 2 * real(x.bytes()), want_x ? real(x.bytes()) : 0},
        [&](Backend& b) {
          const Tensor w = wide(weight, x);
          b.layer_norm_backward(num(x), r.rows, r.cols, x.raw(), w.raw(), mean.raw(), inverse.raw(), g.raw(), pointer(result[0]),
                                pointer(partial_w), pointer(partial_b));
        });
    if (want_w) result[1] = outgoing(*this, 1, total(partial_w), weight.dtype());
    if (want_b) result[2] = outgoing(*this, 2, total(partial_b), bias_dtype);
    return result;
  }
};

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_norm("rms_norm", x, weight, epsilon);
  const Tensor in = x.detach().contiguous();
  const Rows r = rows_of(x);
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  const Tensor inverse = Tensor::empty(Dims{r.rows}, compute_dtype(x.dtype()), x.device());
  run(x.device(), "rms_norm", {4 * real(x.numel()), real(x.bytes() + weight.bytes()), real(x.bytes())}, [&](Backend& backend) {
    const Tensor w = wide(weight, x);
    backend.rms_norm(num(in), r.rows, r.cols, in.raw(), w.raw(), epsilon, y.raw(), inverse.raw());
  });
  if (any_requires_grad({&x, &weight})) {
    auto node = std::make_shared<RmsNormNode>();
    node->x = in, node->weight = weight.detach(), node->inverse = inverse;
    record(node, {&x, &weight}, {&y});
  }
  return y;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  check_norm("layer_norm", x, weight, epsilon);
  if (bias.defined()) {
    check_floating("layer_norm", "bias", bias);
    check_device("layer_norm", "bias", bias, x);
    check_shape("layer_norm", "bias", bias, Dims{x.size(-1)});
  }
  const Tensor in = x.detach().contiguous();
  const Rows r = rows_of(x);
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  const Tensor mean = Tensor::empty(Dims{r.rows}, compute_dtype(x.dtype()), x.device());
  const Tensor inverse = Tensor::empty(Dims{r.rows}, compute_dtype(x.dtype()), x.device());
  run(x.device(), "layer_norm", {7 * real(x.numel()), real(x.bytes() + weight.bytes()), real(x.bytes())}, [&](Backend& backend) {
    const Tensor w = wide(weight, x), b = wide(bias, x);
    backend.layer_norm(num(in), r.rows, r.cols, in.raw(), w.raw(), pointer(b), epsilon, y.raw(), mean.raw(), inverse.raw());
  });
  if (any_requires_grad({&x, &weight, &bias})) {
    auto node = std::make_shared<LayerNormNode>();
    node->x = in, node->weight = weight.detach(), node->mean = mean, node->inverse = inverse;
    if (bias.defined()) node->bias_dtype = bias.dtype();
    record(node, {&x, &weight, &bias}, {&y});
  }
  return y;
}

}  // namespace capstan::ops
