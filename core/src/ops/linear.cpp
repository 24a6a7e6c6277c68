// linear: y = x W^T (+ bias) (+ residual); linear_gelu: gelu(x W^T (+ bias)). Forward rows do not depend on their batch;
// gradients of the weight and bias add straight into their leaves.
#include "ops/linear_shared.h"

#include "ops/common.h"
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

namespace capstan::ops {

namespace {

using kernels::Backend;
using kernels::Gemm;

double d(std::int64_t n) { return static_cast<double>(n); }

class LinearNode final : public Node {
 public:
  Tensor x, weight;
  Tensor before;      // linear_gelu: what GELU was taken of
  bool slope_taken = false;  // gradients arrive as those of `before`
  SharedRows shared;  // empty: x are all rows
  std::string_view name() const override { return before.defined() ? "linear gelu" : "linear"; }
  void release() override { x = weight = before = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(4);
    const std::int64_t t = grads[0].size(0), out = weight.size(0), in = weight.size(1);
    Backend* const backend = grads[0].is_meta() ? nullptr : &grads[0].device().backend();
    const Into dw = wants(1, part) ? into(1, weight.shape(), weight.dtype(), weight.device()) : Into{};
    const Into db = wants(2, part) ? into(2, Dims{out}, weight.dtype(), weight.device()) : Into{};
    Gemm w;  // dW (+)= dY^T X, where the device has that on the way db (+)= sums of dY
    w.a = w.b = num_of(weight.dtype(), "linear"), w.trans_a = true, w.m = out, w.n = in, w.k = t;
    if (dw.sum.defined()) w.c = num_of(dw.sum.dtype(), "linear"), w.accumulate = !dw.overwrite;
    const bool sums = dw.sum.defined() && db.sum.defined() && dw.sum.dtype() == db.sum.dtype() && dw.overwrite == db.overwrite && backend != nullptr &&
                      backend->takes_sums_of_a(w);
    if (sums) w.sums_of_a = db.sum.raw();
    const Tensor dy = before.defined() ? through_gelu(grads[0], db, sums) : row_matrix(grads[0]);
    if (wants(0, part)) {  // dX = dY W
      result[0] = Tensor::empty(Dims{t, in}, dy.dtype(), dy.device());
      Gemm g;
      g.a = g.b = g.c = num_of(dy.dtype(), "linear");
      g.m = t, g.n = in, g.k = out, g.lda = dy.strides()[0], g.ldb = weight.strides()[0], g.ldc = in;
      LinearNode* const of_gelu = gelu_before(g, backend);
      OpScope scope(dy.device(), "linear dx", {2 * d(t) * d(out) * d(in), d(dy.bytes() + weight.bytes()), d(result[0].bytes())});
      if (out == 0) {
        result[0].fill(0);  // a rank without words of the vocabulary
      } else if (!scope.meta()) {
        if (of_gelu != nullptr) g.gelu_slope_of = of_gelu->before.raw(), of_gelu->slope_taken = true;
        backend->gemm(g, dy.raw(), weight.raw(), result[0].raw());
      }
    }
    if (result[0].defined() && shared.scatter) result[0] = shared.scatter(result[0]);
    if (dw.sum.defined()) {
      const Tensor all = shared.gather ? shared.gather(x) : x;
      w.lda = dy.strides()[0], w.ldb = all.strides()[0], w.ldc = in;
      OpScope scope(dy.device(), "linear dw", {2 * d(t) * d(out) * d(in), d(dy.bytes() + all.bytes()), d(dw.sum.bytes())});
      if (!scope.meta()) backend->gemm(w, dy.raw(), all.raw(), dw.sum.raw());
      finish(dw, weight.dtype(), result[1]);
    }
    if (db.sum.defined()) {
      if (!before.defined()) {
        OpScope scope(dy.device(), "linear db", {d(t) * d(out), d(dy.bytes()), d(db.sum.bytes())});
        if (!scope.meta() && !sums) sum_rows(dy, db);
      }
      finish(db, dy.dtype(), result[2]);
    }
    if (wants(3, part)) result[3] = grads[0];
    return result;
  }

 private:
  /// Where the gradient of a weight or bias is summed: its leaf's buffer, or memory of its own.
  struct Into {
    Leaf* leaf = nullptr;
    Tensor sum;
    bool overwrite = true;
  };
  Into into(int input, const Dims& shape, DType type, Device& device) const {
    Into result;
    result.leaf = leaf(input);
    result.sum = result.leaf != nullptr ? result.leaf->accumulate_into(Tensor::wrap(nullptr, shape, type, device, nullptr), result.overwrite)
                                        : Tensor::empty(shape, type == DType::f64 ? DType::f64 : DType::f32, device);
    return result;
  }
  static void finish(const Into& to, DType type, Tensor& result) {
    if (to.leaf != nullptr) to.leaf->done();
    else result = to.sum.to(type);
  }

  /// The linear_gelu whose output x is, when nothing else reads that and the product g, which makes its gradient, takes GELU's
  /// slope: what g makes is then the gradient of what GELU was taken of.
  LinearNode* gelu_before(const Gemm& g, Backend* backend) const {
    auto* const node = dynamic_cast<LinearNode*>(inputs[0].node.get());
    const bool takes = node != nullptr && node->before.defined() && node->readers == 1 && num(node->before) == g.c && !shared.scatter && g.k > 0 && backend != nullptr &&
                       backend->takes_gelu_slope(g);
    return takes ? node : nullptr;
  }

  static void sum_rows(const Tensor& dy, const Into& db) {
    dy.device().backend().column_sum(num(dy), dy.raw(), dy.size(0), dy.size(1), dy.strides()[0], num(db.sum), db.sum.raw(), !db.overwrite);
  }

  /// The gradient of `before`, and in the same pass that of the bias where it is wanted and not `summed` by the weight's.
  Tensor through_gelu(const Tensor& grad, const Into& db, bool summed) const {
    const Tensor g = incoming(grad, before.dtype());
    const std::int64_t t = before.size(0), out = before.size(1);
    const bool wanted = db.sum.defined(), sum = wanted && !summed;
    Tensor dh = slope_taken ? g : Tensor::empty(before.shape(), before.dtype(), before.device());
    OpScope scope(dh.device(), "gelu dx", {(wanted ? 21 : 20) * d(t) * d(out), (wanted ? 3 : 2) * d(dh.bytes()), d(dh.bytes())});  // as a pass of its own
    if (scope.meta()) return dh;
    if (slope_taken && sum) sum_rows(dh, db);
    if (slope_taken) return dh;
    if (sum) dh.device().backend().gelu_backward_sum(num(dh), t, out, before.raw(), g.raw(), dh.raw(), num(db.sum), db.sum.raw(), !db.overwrite);
    else dh.device().backend().unary_backward(kernels::UnaryOp::gelu, num(dh), t * out, before.raw(), g.raw(), dh.raw());
    return dh;
  }
};

/// linear_of_shared_rows, with GELU after it when `gelu`.
Tensor product(const Tensor& x, const SharedRows& shared, const Tensor& weight, const Tensor& bias, const Tensor& residual, bool gelu);

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual) {
  return product(x, {}, weight, bias, residual, false);
}
Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias) { return product(x, {}, weight, bias, {}, true); }

Tensor linear_of_shared_rows(const Tensor& x, const SharedRows& shared, const Tensor& weight, const Tensor& bias, const Tensor& residual) {
  return product(x, shared, weight, bias, residual, false);
}
Tensor linear_gelu_of_shared_rows(const Tensor& x, const SharedRows& shared, const Tensor& weight, const Tensor& bias) {
  return product(x, shared, weight, bias, {}, true);
}

namespace {

Tensor product(const Tensor& x, const SharedRows& shared, const Tensor& weight, const Tensor& bias, const Tensor& residual, bool gelu) {
  if (x.rank() != 2 || weight.rank() != 2 || x.size(1) != weight.size(1))
    fail(Fault::programming, "linear", "shapes: expected x [T, in] and weight [out, in], got " + to_string(x.shape()) + " and " + to_string(weight.shape()));
  if (x.dtype() != weight.dtype())
    fail(Fault::programming, "linear", "element types differ: x is " + std::string(name_of(x.dtype())) + ", weight is " + std::string(name_of(weight.dtype())));
  const Tensor mine = x.detach().contiguous(), rows = shared.gather ? shared.gather(mine) : mine;
  const std::int64_t t = rows.size(0), in = x.size(1), out = weight.size(0);
  if (bias.defined() && (!(bias.shape() == Dims{out}) || bias.dtype() != x.dtype()))
    fail(Fault::programming, "linear", "bias: expected " + to_string(Dims{out}) + " of the weight's element type, got " + to_string(bias.shape()));
  if (residual.defined() && (!(residual.shape() == Dims{t, out}) || residual.dtype() != x.dtype()))
    fail(Fault::programming, "linear", "residual: expected " + to_string(Dims{t, out}) + " of x's element type, got " + to_string(residual.shape()));

  const Tensor w = weight.detach().contiguous();  // contiguous: what keeps rows independent of their count
  Tensor y = Tensor::empty(Dims{t, out}, x.dtype(), x.device());
  const Tensor before = gelu ? Tensor::empty(y.shape(), y.dtype(), y.device()) : Tensor();
  {
    // GELU's bytes are those of a pass of its own, as a GPU makes it where the product's epilogue does not take it.
    OpScope scope(x.device(), "linear", {2 * d(t) * d(out) * d(in) + (gelu ? 14 * d(t) * d(out) : 0),
                                         d(rows.bytes() + weight.bytes() + (residual.defined() || gelu ? y.bytes() : 0)), d(y.bytes()) * (gelu ? 2 : 1)});
    if (!scope.meta()) {
      Gemm g;
      g.a = g.b = g.c = num_of(x.dtype(), "linear");
      g.trans_b = true, g.invariant = true;
      if (gelu) g.before_gelu = before.raw();
      g.m = t, g.n = out, g.k = in, g.lda = in, g.ldb = in, g.ldc = out;  // one row may keep a wide stride: it means nothing
      const Tensor add = residual.defined() ? residual.detach().contiguous() : Tensor(), b = bias.defined() ? bias.detach().contiguous() : Tensor();
      x.device().backend().gemm(g, rows.raw(), w.raw(), y.raw(), b.defined() ? b.raw() : nullptr, add.defined() ? add.raw() : nullptr);
    }
  }
  if (any_requires_grad({&x, &weight, &bias, &residual})) {
    auto node = std::make_shared<LinearNode>();
    node->x = mine, node->weight = w, node->before = before, node->shared = shared;
    record(node, {&x, &weight, &bias, &residual}, {&y});
  }
  return y;
}

}  // namespace

}  // namespace capstan::ops
