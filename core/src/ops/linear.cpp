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

using kernels::Gemm;

double d(std::int64_t n) { return static_cast<double>(n); }

class LinearNode final : public Node {
 public:
  Tensor x, weight;
  Tensor before;      // linear_gelu: what GELU was taken of
  SharedRows shared;  // empty: x are all rows
  std::string_view name() const override { return before.defined() ? "linear gelu" : "linear"; }
  void release() override { x = weight = before = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(4);
    const Tensor dy = before.defined() ? through_gelu(grads[0], part, result[2]) : row_matrix(grads[0]);
    const std::int64_t t = dy.size(0), out = weight.size(0), in = weight.size(1);
    if (wants(0, part)) {  // dX = dY W
      result[0] = Tensor::empty(Dims{t, in}, dy.dtype(), dy.device());
      OpScope scope(dy.device(), "linear dx", {2 * d(t) * d(out) * d(in), d(dy.bytes() + weight.bytes()), d(result[0].bytes())});
      if (out == 0) {
        result[0].fill(0);  // a rank without words of the vocabulary
      } else if (!scope.meta()) {
        Gemm g;
        g.a = g.b = g.c = num_of(dy.dtype(), "linear");
        g.m = t, g.n = in, g.k = out, g.lda = dy.strides()[0], g.ldb = weight.strides()[0], g.ldc = in;
        dy.device().backend().gemm(g, dy.raw(), weight.raw(), result[0].raw());
      }
    }
    if (result[0].defined() && shared.scatter) result[0] = shared.scatter(result[0]);
    if (wants(1, part)) {  // dW (+)= dY^T X
      const Tensor all = shared.gather ? shared.gather(x) : x;
      bool overwrite = true;
      Leaf* to = leaf(1);
      Tensor dw = to != nullptr ? to->accumulate_into(weight, overwrite)
                                : Tensor::empty(weight.shape(), weight.dtype() == DType::f64 ? DType::f64 : DType::f32, dy.device());
      OpScope scope(dy.device(), "linear dw", {2 * d(t) * d(out) * d(in), d(dy.bytes() + all.bytes()), d(dw.bytes())});
      if (!scope.meta()) {
        Gemm g;
        g.a = g.b = num_of(dy.dtype(), "linear"), g.c = num_of(dw.dtype(), "linear");
        g.trans_a = true, g.accumulate = !overwrite;
        g.m = out, g.n = in, g.k = t, g.lda = dy.strides()[0], g.ldb = all.strides()[0], g.ldc = in;
        dy.device().backend().gemm(g, dy.raw(), all.raw(), dw.raw());
      }
      if (to != nullptr) to->done();
      else result[1] = dw.to(weight.dtype());
    }
    if (wants(2, part) && !before.defined()) {
      bool overwrite = true;
      Leaf* to = leaf(2);
      const Tensor like = Tensor::wrap(nullptr, Dims{out}, dy.dtype(), dy.device(), nullptr);
      Tensor db = to != nullptr ? to->accumulate_into(like, overwrite)
                                : Tensor::empty(Dims{out}, dy.dtype() == DType::f64 ? DType::f64 : DType::f32, dy.device());
      OpScope scope(dy.device(), "linear db", {d(t) * d(out), d(dy.bytes()), d(db.bytes())});
      if (!scope.meta()) dy.device().backend().column_sum(num(dy), dy.raw(), t, out, dy.strides()[0], num(db), db.raw(), !overwrite);
      if (to != nullptr) to->done();
      else result[2] = db.to(dy.dtype());
    }
    if (wants(3, part)) result[3] = grads[0];
    return result;
  }

 private:
  /// The gradient of `before`, and in the same pass that of the bias where it is wanted.
  Tensor through_gelu(const Tensor& grad, Part part, Tensor& bias_grad) {
    const Tensor g = incoming(grad, before.dtype());
    const std::int64_t t = before.size(0), out = before.size(1);
    Tensor dh = Tensor::empty(before.shape(), before.dtype(), before.device());
    OpScope scope(dh.device(), "gelu dx", {(wants(2, part) ? 21 : 20) * d(t) * d(out), (wants(2, part) ? 3 : 2) * d(dh.bytes()), d(dh.bytes())});
    if (!wants(2, part)) {
      if (!scope.meta()) dh.device().backend().unary_backward(kernels::UnaryOp::gelu, num(dh), t * out, before.raw(), g.raw(), dh.raw());
      return dh;
    }
    bool overwrite = true;
    Leaf* to = leaf(2);
    const Tensor like = Tensor::wrap(nullptr, Dims{out}, dh.dtype(), dh.device(), nullptr);
    Tensor db = to != nullptr ? to->accumulate_into(like, overwrite) : Tensor::empty(Dims{out}, dh.dtype() == DType::f64 ? DType::f64 : DType::f32, dh.device());
    if (!scope.meta())
      dh.device().backend().gelu_backward_sum(num(dh), t, out, before.raw(), g.raw(), dh.raw(), num(db), db.raw(), !overwrite);
    if (to != nullptr) to->done();
    else bias_grad = db.to(dh.dtype());
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
