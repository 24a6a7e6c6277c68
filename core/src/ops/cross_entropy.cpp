// linear_cross_entropy: scores of targets under softmax(x W^T), in chunks of rows, so that T x vocabulary
// logits never exist at once. With the token weights known, the gradient is made in the same pass: logits
// are computed once.
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>

namespace capstan::ops {

namespace {

using kernels::Gemm;

/// Of logits at a time: more mean fewer passes over the weight, and memory.
std::int64_t chunk_bytes(Device& device) { return std::int64_t{device.kind() == DeviceKind::cuda ? 1024 : 128} << 20; }

DType score_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// What the passes share: shapes, the chunk of logits, and the gradients when there are any.
struct Pass {
  Tensor x, weight, targets;
  std::int64_t t = 0, c = 0, v = 0, chunk = 0, ld = 0;
  Tensor logits, narrow;  // [chunk, ld]; narrow: the gradient of the logits in bf16 models
  DType compute = DType::f32;

  Pass(const Tensor& x_in, const Tensor& w, const Tensor& targets_in) : x(x_in), weight(w), targets(targets_in) {
    t = x.size(0), c = x.size(1), v = weight.size(0);
    compute = score_type(x.dtype());
    // On the CPU padded rows would send the library down a path whose bits depend on the row count; a GPU wants aligned rows.
    const bool gpu = x.device().kind() == DeviceKind::cuda;
    ld = gpu ? (v + 63) / 64 * 64 : v;
    const std::int64_t most = std::clamp<std::int64_t>(chunk_bytes(x.device()) / (ld * size_of(compute)), 16, gpu ? 65536 : 4096);
    const std::int64_t chunks = std::max<std::int64_t>(1, (t + most - 1) / most);
    chunk = std::min(((t + chunks - 1) / chunks + 15) / 16 * 16, t);  // even ones: a short last chunk would be slow
    logits = Tensor::empty(Dims{chunk, ld}, compute, x.device());
    if (x.dtype() == DType::bf16) narrow = Tensor::empty(Dims{chunk, ld}, DType::bf16, x.device());
  }

  void forward_chunk(std::int64_t row, std::int64_t rows) const {
    Gemm g;
    g.a = g.b = num_of(x.dtype(), "linear_cross_entropy"), g.c = num_of(compute, "linear_cross_entropy");
    g.trans_b = true, g.invariant = true;
    g.m = rows, g.n = v, g.k = c, g.lda = c, g.ldb = c, g.ldc = ld;
    x.device().backend().gemm(g, x.narrow(0, row, rows).raw(), weight.raw(), logits.raw());
  }

  /// What the kernels are told of rows [row, row + rows); `out` holds their scores.
  kernels::ScoreRows chunk_rows(std::int64_t row, std::int64_t rows, const Tensor& logprob, const Tensor& logsumexp, const Tensor& entropy) const {
    const auto at = [&](const Tensor& t) { return t.defined() ? t.narrow(0, row, rows).raw() : nullptr; };
    kernels::ScoreRows s;
    s.compute = num(compute), s.rows = rows, s.cols = v, s.stride = ld, s.logits = logits.raw();
    s.targets = static_cast<const std::int32_t*>(at(targets));
    s.logprob = at(logprob), s.logsumexp = at(logsumexp), s.entropy = at(entropy);
    return s;
  }

  /// Where the logits' gradient goes: the model's element type where that is narrower.
  void* gradient() const { return narrow.defined() ? narrow.raw() : logits.raw(); }

  void dx_chunk(const void* dlogits, std::int64_t row, std::int64_t rows, const Tensor& dx) const {
    Gemm g;
    g.a = g.b = num_of(x.dtype(), "linear_cross_entropy"), g.c = num_of(dx.dtype(), "linear_cross_entropy");
    g.m = rows, g.n = c, g.k = v, g.lda = ld, g.ldb = weight.strides()[0], g.ldc = c;
    x.device().backend().gemm(g, dlogits, weight.raw(), dx.narrow(0, row, rows).raw());
  }

  void dw_chunk(const void* dlogits, std::int64_t row, std::int64_t rows, const Tensor& dw, bool accumulate) const {
    Gemm g;
    g.a = g.b = num_of(x.dtype(), "linear_cross_entropy"), g.c = num_of(dw.dtype(), "linear_cross_entropy");
    g.trans_a = true, g.accumulate = accumulate;
    g.m = v, g.n = c, g.k = rows, g.lda = ld, g.ldb = x.strides()[0], g.ldc = c;
    x.device().backend().gemm(g, dlogits, x.narrow(0, row, rows).raw(), dw.raw());
  }
};

/// Of one product over some rows.
Cost gemm_cost(const Pass& p, std::int64_t rows) {
  const double r = static_cast<double>(rows), c = static_cast<double>(p.c), v = static_cast<double>(p.v);
  const double wide = static_cast<double>(size_of(p.compute));
  return {2.0 * r * c * v, r * c * wide + static_cast<double>(p.weight.bytes()), r * v * wide};
}

/// The weight's gradient: the leaf's own buffer when there is one.
struct WeightGradient {
  Tensor value;
  bool overwrite = true;
  Leaf* leaf = nullptr;
};

WeightGradient weight_gradient(Leaf* leaf, const Tensor& weight) {
  WeightGradient g;
  g.leaf = leaf;
  g.value = leaf != nullptr ? leaf->accumulate_into(weight, g.overwrite)
                            : Tensor::empty(weight.shape(), score_type(weight.dtype()), weight.device());
  return g;
}

/// With known weights: the gradient is there already.
class ObjectiveNode final : public Node {
 public:
  Tensor dx, dw;
  Leaf* leaf_done = nullptr;
  std::string_view name() const override { return "linear_cross_entropy"; }
  void release() override { dx = dw = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!grads[0].is_meta() && !grads[0].device().backend().is_one("linear_cross_entropy: the gradient of its objective", num(grads[0]), grads[0].raw()))
      fail(Fault::programming, "linear_cross_entropy", "the gradient of its objective must be 1, got " + std::to_string(grads[0].item()) +
                                                           ": put every scaling into the token weights");
    std::vector<Tensor> result(2);
    if (wants(0, part)) result[0] = dx;
    if (wants(1, part)) {
      if (leaf_done != nullptr) leaf_done->done();
      else result[1] = dw;
    }
    return result;
  }
};

/// With gradients of the scores known only later: logits are computed again, chunk by chunk.
class ScoreNode final : public Node {
 public:
  Tensor x, weight, targets, logsumexp, entropy;
  std::string_view name() const override { return "linear_cross_entropy"; }
  void release() override { x = weight = targets = logsumexp = entropy = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(2);
    const bool want_x = wants(0, part), want_w = wants(1, part);
    Pass p(x, weight, targets);
    if (want_x) result[0] = Tensor::empty(x.shape(), x.dtype(), x.device());
    WeightGradient dw;
    if (want_w) dw = weight_gradient(leaf(1), weight);
    Cost cost = gemm_cost(p, p.t);
    for (const bool wanted : {want_x, want_w})
      if (wanted) cost += gemm_cost(p, p.t);
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
  Pass p(x.detach().contiguous(), weight.detach().contiguous(), targets.detach().contiguous());
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
    if (weight.requires_grad()) dw = weight_gradient(dynamic_cast<Leaf*>(weight.node().get()), weight);
  }
  for (std::int64_t row = 0; row < p.t; row += p.chunk) {
    const std::int64_t rows = std::min(p.chunk, p.t - row);
    {
      OpScope scope(device, "head logits", gemm_cost(p, rows));
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
      OpScope scope(device, "head dx", gemm_cost(p, rows));
      if (!scope.meta()) p.dx_chunk(dlogits, row, rows, node->dx);
    }
    if (dw.value.defined()) {
      OpScope scope(device, "head dw", gemm_cost(p, rows));
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
