// linear_cross_entropy: scores of targets under softmax(x W^T), in chunks of rows, so that T x vocabulary
// logits never exist at once. With the token weights known, the gradient is made in the same pass: logits
// are computed once.
#include "ops/head_pass.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>

namespace capstan::ops {

namespace {

/// With gradients of the scores known only later: logits are computed again, chunk by chunk.
class ScoreNode final : public Node {
 public:
  Tensor x, weight, targets, logsumexp, entropy;
  std::string_view name() const override { return "linear_cross_entropy"; }
  void release() override { x = weight = targets = logsumexp = entropy = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(2);
    const bool want_x = wants(0, part), want_w = wants(1, part);
    HeadPass p(x, weight, targets);
    if (want_x) result[0] = Tensor::empty(x.shape(), x.dtype(), x.device());
    WeightGradient dw;
    if (want_w) dw = WeightGradient::of(leaf(1), weight);
    Cost cost = p.gemm_cost(p.t);
    for (const bool wanted : {want_x, want_w})
      if (wanted) cost += p.gemm_cost(p.t);
    OpScope scope(x.device(), "linear_cross_entropy dx", cost);
    if (!scope.meta()) {
      Tensor kept[3];  // contiguous, in the compute type
      for (std::size_t i = 0; i < 3; ++i)
        if (grads[i].defined()) kept[i] = grads[i].detach().to(p.compute).contiguous();
      for (std::int64_t row = 0; row < p.t; row += p.chunk) {
        const std::int64_t rows = std::min(p.chunk, p.t - row);
        p.forward_chunk(row, rows);
        kernels::ScoreRows s = p.chunk_rows(row, rows, Tensor(), logsumexp, entropy);
        const auto gradient = [&](std::size_t i) { return grads[i].defined() ? kept[i].narrow(0, row, rows).raw() : nullptr; };
        s.g_logprob = gradient(0), s.g_logsumexp = gradient(1), s.g_entropy = gradient(2);
        s.narrow = p.narrow.defined() ? p.narrow.raw() : nullptr;
        x.device().backend().score_rows_backward(s);
        const void* dlogits = p.gradient();
        if (want_x) p.dx_chunk(dlogits, row, rows, result[0]);
        if (want_w) p.dw_chunk(dlogits, row, rows, dw.value, row > 0 || !dw.overwrite);
      }
    }
    if (want_w) {
      if (dw.leaf != nullptr) dw.leaf->done();
      else result[1] = dw.value.to(weight.dtype());
    }
    return result;
  }

};

}  // namespace

HeadScore linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor* weights, bool grad) {
  constexpr const char* op = "linear_cross_entropy";
  if (x.rank() != 2 || weight.rank() != 2 || x.size(1) != weight.size(1) || x.dtype() != weight.dtype())
    fail(Fault::programming, op, "shapes: expected x [T, C] and weight [V, C] of one element type, got " + to_string(x.shape()) + " and " + to_string(weight.shape()));
  if (!(targets.shape() == Dims{x.size(0)}) || targets.dtype() != DType::i32)
    fail(Fault::programming, op, "targets: expected i32 [" + std::to_string(x.size(0)) + "], got " + std::string(name_of(targets.dtype())) + " " + to_string(targets.shape()));
  if (weights != nullptr && (!(weights->shape() == targets.shape()) || weights->dtype() != DType::f32))
    fail(Fault::programming, op, "weights: expected f32 " + to_string(targets.shape()) + ", got " + to_string(weights->shape()));
  Device& device = x.device();
  HeadPass p(x.detach().contiguous(), weight.detach().contiguous(), targets.detach().contiguous());
  const Tensor known = weights != nullptr ? weights->detach().contiguous() : Tensor();
  const DType type = p.compute;
  HeadScore out{Tensor::empty(Dims{p.t}, type, device), Tensor::empty(Dims{p.t}, type, device), Tensor::empty(Dims{p.t}, type, device), Tensor()};
  if (!targets.is_meta()) {
    const std::int64_t bad = device.backend().first_outside(op, p.t, p.targets.data<std::int32_t>(), -1, p.v);
    if (bad >= 0)
      fail(Fault::input, op, "target " + std::to_string(static_cast<std::int64_t>(p.targets.narrow(0, bad, 1).item())) + " of row " + std::to_string(bad) +
                                 " is outside the vocabulary of " + std::to_string(p.v) + ": the dataset was made with another tokenizer");
  }
  const bool differentiable = grad && any_requires_grad({&x, &weight});
  const bool now = differentiable && weights != nullptr;
  std::shared_ptr<ObjectiveNode> node;
  WeightGradient dw;
  if (now) {
    node = std::make_shared<ObjectiveNode>();
    if (x.requires_grad()) node->dx = Tensor::empty(x.shape(), x.dtype(), device);
    if (weight.requires_grad()) dw = WeightGradient::of(dynamic_cast<Leaf*>(weight.node().get()), weight);
  }
  for (std::int64_t row = 0; row < p.t; row += p.chunk) {
    const std::int64_t rows = std::min(p.chunk, p.t - row);
    {
      OpScope scope(device, "head logits", p.gemm_cost(rows));
      if (!scope.meta()) p.forward_chunk(row, rows);
    }
    {
      const double elements = static_cast<double>(rows * p.v), bytes = elements * static_cast<double>(size_of(type));
      OpScope scope(device, "head softmax", {5 * elements, bytes, now ? bytes : 0});
      if (!scope.meta()) {
        kernels::ScoreRows rows_of_chunk = p.chunk_rows(row, rows, out.logprob, out.logsumexp, out.entropy);
        if (now) {
          rows_of_chunk.weights = known.narrow(0, row, rows).data<float>();
          rows_of_chunk.narrow = p.narrow.defined() ? p.narrow.raw() : nullptr;
        }
        device.backend().score_rows(rows_of_chunk);
      }
    }
    if (!now) continue;
    const void* dlogits = p.gradient();
    if (node->dx.defined()) {
      OpScope scope(device, "head dx", p.gemm_cost(rows));
      if (!scope.meta()) p.dx_chunk(dlogits, row, rows, node->dx);
    }
    if (dw.value.defined()) {
      OpScope scope(device, "head dw", p.gemm_cost(rows));
      if (!scope.meta()) p.dw_chunk(dlogits, row, rows, dw.value, row > 0 || !dw.overwrite);
    }
  }
  if (weights != nullptr) {  // summed in f64 and in order: one number, many tokens
    out.objective = Tensor::empty(Dims{}, type, device);
    if (!out.objective.is_meta())
      device.backend().weighted_sum(num(type), p.t, known.data<float>(), out.logprob.raw(), out.objective.raw());
  }
  if (now) {
    node->leaf_done = dw.leaf;
    if (dw.value.defined() && dw.leaf == nullptr) node->dw = dw.value.to(weight.dtype());
    record(node, {&x, &weight}, {&out.objective});
  } else if (differentiable) {
    auto later = std::make_shared<ScoreNode>();
    later->x = p.x, later->weight = p.weight, later->targets = targets;
    later->logsumexp = out.logsumexp, later->entropy = out.entropy;
    record(later, {&x, &weight}, {&out.logprob, &out.logsumexp, &out.entropy});
  }
  return out;
}

}  // namespace capstan::ops
