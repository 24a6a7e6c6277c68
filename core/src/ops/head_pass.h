// defines: HeadPass, WeightGradient, ObjectiveNode: chunks of rows of logits and their products, for heads over a whole
// vocabulary (ops/cross_entropy.cpp) and over a tensor rank's part of one (parallel/vocabulary.cpp).
#pragma once
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>
#include <string>
#include <vector>

namespace capstan::ops {

inline DType score_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// What the passes share: shapes, the chunk of logits, and the gradients when there are any.
struct HeadPass {
  Tensor x, weight, targets;
  std::int64_t t = 0, c = 0, v = 0, chunk = 0, ld = 0;
  Tensor logits, narrow;  // [chunk, ld]; narrow: the gradient of the logits in bf16 models
  DType compute = DType::f32;

  static constexpr const char* op = "linear_cross_entropy";

  /// `widest`: columns by which the chunk is chosen, when ranks with different v have to choose alike.
  HeadPass(const Tensor& x_in, const Tensor& w, const Tensor& targets_in, std::int64_t widest = 0)
      : x(x_in), weight(w), targets(targets_in) {
    t = x.size(0), c = x.size(1), v = weight.size(0);
    compute = score_type(x.dtype());
    // On the CPU padded rows would send the library down a path whose bits depend on the row count; a GPU wants aligned
    // rows.
    const bool gpu = x.device().kind() == DeviceKind::cuda;
    const auto stride = [&](std::int64_t columns) { return gpu ? (columns + 63) / 64 * 64 : columns; };
    ld = stride(v);
    // Of logits at a time: more mean fewer passes over the weight, and memory.
    const std::int64_t bytes = std::int64_t{gpu ? 1024 : 128} << 20;
    const std::int64_t most =
        std::clamp<std::int64_t>(bytes / (stride(std::max(v, widest)) * size_of(compute)), 16, gpu ? 65536 : 4096);
    const std::int64_t chunks = std::max<std::int64_t>(1, (t + most - 1) / most);
    chunk = std::min(((t + chunks - 1) / chunks + 15) / 16 * 16, t);  // even ones: a short last chunk would be slow
    logits = Tensor::empty(Dims{chunk, ld}, compute, x.device());
    if (x.dtype() == DType::bf16) narrow = Tensor::empty(Dims{chunk, ld}, DType::bf16, x.device());
  }

  void forward_chunk(std::int64_t row, std::int64_t rows) const {
    kernels::Gemm g;
    g.a = g.b = num_of(x.dtype(), op), g.c = num_of(compute, op);
    g.trans_b = true, g.invariant = true;
    g.m = rows, g.n = v, g.k = c, g.lda = c, g.ldb = c, g.ldc = ld;
    x.device().backend().gemm(g, x.narrow(0, row, rows).raw(), weight.raw(), logits.raw());
  }

  /// What the kernels are told of rows [row, row + rows); `out` holds their scores.
  kernels::ScoreRows chunk_rows(std::int64_t row, std::int64_t rows, const Tensor& logprob, const Tensor& logsumexp,
                                const Tensor& entropy) const {
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
    kernels::Gemm g;
    g.a = g.b = num_of(x.dtype(), op), g.c = num_of(dx.dtype(), op);
    g.m = rows, g.n = c, g.k = v, g.lda = ld, g.ldb = weight.strides()[0], g.ldc = c;
    x.device().backend().gemm(g, dlogits, weight.raw(), dx.narrow(0, row, rows).raw());
  }

  void dw_chunk(const void* dlogits, std::int64_t row, std::int64_t rows, const Tensor& dw, bool accumulate) const {
    kernels::Gemm g;
    g.a = g.b = num_of(x.dtype(), op), g.c = num_of(dw.dtype(), op);
    g.trans_a = true, g.accumulate = accumulate;
    g.m = v, g.n = c, g.k = rows, g.lda = ld, g.ldb = x.strides()[0], g.ldc = c;
    x.device().backend().gemm(g, dlogits, x.narrow(0, row, rows).raw(), dw.raw());
  }

  /// Of one product over some rows.
  Cost gemm_cost(std::int64_t rows) const {
    const double r = static_cast<double>(rows), width = static_cast<double>(c), columns = static_cast<double>(v);
    const double wide = static_cast<double>(size_of(compute));
    return {2.0 * r * width * columns, r * width * wide + static_cast<double>(weight.bytes()), r * columns * wide};
  }
};

/// The weight's gradient: the leaf's own buffer when there is one.
struct WeightGradient {
  Tensor value;
  bool overwrite = true;
  Leaf* leaf = nullptr;

  static WeightGradient of(Leaf* leaf, const Tensor& weight) {
    WeightGradient g;
    g.leaf = leaf;
    g.value = leaf != nullptr ? leaf->accumulate_into(weight, g.overwrite)
                              : Tensor::empty(weight.shape(), score_type(weight.dtype()), weight.device());
    return g;
  }
};

/// With known weights: the gradient is there already.
class ObjectiveNode final : public Node {
 public:
  Tensor dx, dw;
  Leaf* leaf_done = nullptr;
  std::string_view name() const override { return HeadPass::op; }
  void release() override { dx = dw = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!grads[0].is_meta() && !grads[0].device().backend().is_one("linear_cross_entropy: the gradient of its objective",
                                                                   num(grads[0]), grads[0].raw()))
      fail(Fault::programming, HeadPass::op,
           "the gradient of its objective must be 1, got " + std::to_string(grads[0].item()) +
               ": put every scaling into the token weights");
    std::vector<Tensor> result(2);
    if (wants(0, part)) result[0] = dx;
    if (wants(1, part)) {
      if (leaf_done != nullptr)
        leaf_done->done();
      else
        result[1] = dw;
    }
    return result;
  }
};

}  // namespace capstan::ops
