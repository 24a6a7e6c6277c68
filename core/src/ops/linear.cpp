// linear: y = x W^T (+ bias) (+ residual). Forward rows do not depend on their batch; gradients of the
// weight and bias add straight into their leaves.
#include "ops/linear_shared.h"

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
  SharedRows shared;  // empty: x are all rows
  std::string_view name() const override { return "linear"; }
  void release() override { x = weight = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    const Tensor dy = row_matrix(grads[0]);
    const std::int64_t t = dy.size(0), out = weight.size(0), in = weight.size(1);
    std::vector<Tensor> result(4);
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
    if (wants(2, part)) {
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
};

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual) {
  return linear_of_shared_rows(x, {}, weight, bias, residual);
}

Tensor linear_of_shared_rows(const Tensor& x, const SharedRows& shared, const Tensor& weight, const Tensor& bias, const Tensor& residual) {
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
  {
    OpScope scope(x.device(), "linear", {2 * d(t) * d(out) * d(in), d(rows.bytes() + weight.bytes() + (residual.defined() ? y.bytes() : 0)), d(y.bytes())});
    if (!scope.meta()) {
      Gemm g;
      g.a = g.b = g.c = num_of(x.dtype(), "linear");
      g.trans_b = true, g.invariant = true;
      g.m = t, g.n = out, g.k = in, g.lda = in, g.ldb = in, g.ldc = out;  // one row may keep a wide stride: it means nothing
      const Tensor add = residual.defined() ? residual.detach().contiguous() : Tensor(), b = bias.defined() ? bias.detach().contiguous() : Tensor();
      x.device().backend().gemm(g, rows.raw(), w.raw(), y.raw(), b.defined() ? b.raw() : nullptr, add.defined() ? add.raw() : nullptr);
    }
  }
  if (any_requires_grad({&x, &weight, &bias, &residual})) {
    auto node = std::make_shared<LinearNode>();
    node->x = mine, node->weight = w, node->shared = shared;
    record(node, {&x, &weight, &bias, &residual}, {&y});
  }
  return y;
}

}  // namespace capstan::ops
