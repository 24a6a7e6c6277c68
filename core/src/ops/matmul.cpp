// matmul: [..., M, K] x [..., K, N], batched over equal leading dimensions; b may have none.
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>

namespace capstan::ops {

namespace {

using kernels::Gemm;

/// One operand as GEMM reads it: contiguous leading dimensions, the last two plain or transposed.
struct Operand {
  Tensor value;
  bool transposed = false;
  std::int64_t ld = 0, batch_stride = 0;
};

Operand operand(const Tensor& t, bool plain) {
  Operand o;
  if (plain) {
    o.value = t.detach().contiguous();
    o.ld = t.size(-1);
    return o;
  }
  const int r = t.rank();
  const std::int64_t rows = t.size(-2), cols = t.size(-1);
  auto leading_ok = [&](const Tensor& v) {
    std::int64_t step = -1;
    for (int i = r - 3; i >= 0; --i) {
      if (step >= 0 && v.strides()[i] != step) return false;
      step = v.strides()[i] * v.shape()[i];
    }
    return true;
  };
  o.value = t.detach();
  if (leading_ok(o.value) && t.strides()[r - 1] == 1 && t.strides()[r - 2] >= cols) {
    o.ld = t.strides()[r - 2];
  } else if (leading_ok(o.value) && t.strides()[r - 2] == 1 && t.strides()[r - 1] >= rows) {
    o.transposed = true, o.ld = t.strides()[r - 1];
  } else {
    o.value = o.value.contiguous();
    o.ld = cols;
  }
  o.batch_stride = r > 2 ? o.value.strides()[r - 3] : 0;
  return o;
}

std::int64_t leading(const Tensor& t) {
  std::int64_t n = 1;
  for (int i = 0; i < t.rank() - 2; ++i) n *= t.shape()[i];
  return n;
}

/// C = A B into a new tensor of `shape`.
Tensor product(const Tensor& a, const Tensor& b, const Dims& shape, const char* name) {
  Tensor c = Tensor::empty(shape, a.dtype(), a.device());
  const std::int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1), batch = leading(a);
  OpScope scope(a.device(), name, {2.0 * static_cast<double>(batch * m) * static_cast<double>(n * k),
                                   static_cast<double>(a.bytes() + b.bytes()), static_cast<double>(c.bytes())});
  if (scope.meta()) return c;
  if (k == 0) {
    c.fill(0);
    return c;
  }
  // One product keeps rows of A independent of their count, which asks for a plain A; batches do not promise it.
  const Operand x = operand(a, batch == 1), y = operand(b, false);
  Gemm g;
  g.a = g.b = g.c = num_of(a.dtype(), "matmul");
  g.trans_a = x.transposed, g.trans_b = y.transposed;
  g.m = m, g.n = n, g.k = k, g.lda = x.ld, g.ldb = y.ld, g.ldc = n;
  g.batch = batch, g.stride_a = x.batch_stride, g.stride_b = y.batch_stride, g.stride_c = m * n;
  g.invariant = batch == 1;
  a.device().backend().gemm(g, x.value.raw(), y.value.raw(), c.raw());
  return c;
}

class MatmulNode final : public Node {
 public:
  Tensor a, b;
  std::string_view name() const override { return "matmul"; }
  void release() override { a = b = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    const Tensor dc = grads[0].contiguous();
    std::vector<Tensor> result(2);
    if (wants(0, part)) result[0] = product(dc, b.transposed(-1, -2), a.shape(), "matmul dA");
    if (wants(1, part)) result[1] = product(a.transposed(-1, -2), dc, b.shape(), "matmul dB");
    return result;
  }
};

}  // namespace

Tensor matmul(const Tensor& a, const Tensor& b) {
  const auto refuse = [&] {
    fail(Fault::programming, "matmul", "shapes: expected [..., M, K] and [..., K, N] with equal leading dimensions (or none on b), got " +
                                           to_string(a.shape()) + " and " + to_string(b.shape()));
  };
  if (a.rank() < 2 || b.rank() < 2 || a.size(-1) != b.size(-2)) refuse();
  if (a.dtype() != b.dtype()) fail(Fault::programming, "matmul", "element types differ: " + std::string(name_of(a.dtype())) + " and " + std::string(name_of(b.dtype())));
  if (b.rank() == 2 && a.rank() > 2) {  // fold a's leading dimensions into rows
    Dims flat{leading(a) * a.size(-2), a.size(-1)}, shape = a.shape();
    shape[a.rank() - 1] = b.size(-1);
    return reshape(matmul(reshape(a, flat), b), shape);
  }
  if (a.rank() != b.rank()) refuse();
  for (int i = 0; i < a.rank() - 2; ++i)
    if (a.shape()[i] != b.shape()[i]) refuse();
  Dims shape = a.shape();
  shape[a.rank() - 1] = b.size(-1);
  Tensor c = product(a, b, shape, "matmul");
  if (any_requires_grad({&a, &b})) {
    auto node = std::make_shared<MatmulNode>();
    node->a = a.detach(), node->b = b.detach();
    record(node, {&a, &b}, {&c});
  }
  return c;
}

}  // namespace capstan::ops
