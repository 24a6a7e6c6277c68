// linear_fp8: y = x W^T (+ bias) (+ residual) with operands in fp8. Each of the three products sums along the rows of both
// its operands, as Hopper's fp8 products must; so x, W and dy are quantized straight and turned over, in one pass:
//   y [T, out]   = x [T, in]       W [out, in]^T
//   dx [T, in]   = dy [T, out]     W^T [in, out]^T
//   dW [out, in] = dy^T [out, T']  x^T [in, T']^T     T' is T padded with zeros
#include "ops/linear_fp8.h"

#include "ops/common.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/shared/fp8.h>

#include <utility>

namespace capstan::ops {

namespace {

using kernels::Fp8Places;
using kernels::GemmFp8;
using kernels::Scaling;

Scaling scaling_of(const LinearPrecision& p) {
  return p.kind == LinearPrecision::Kind::mxfp8 ? Scaling::block : Scaling::tensor;
}

/// A matrix [rows, cols] in fp8 with its scales: straight, turned over, or both. Bytes; undefined where it is not there.
struct Fp8Matrix {
  std::int64_t rows = 0, cols = 0;
  Num num = Num::f8e4m3;
  Scaling scaling = Scaling::tensor;
  Tensor data, scale, turned, turned_scale;
};

/// `m` filled from x.
void quantize(const Tensor& x, const Fp8Matrix& m) {
  const std::int64_t written = m.data.numel() + m.turned.numel();
  run(x.device(), "quantize", {0, (m.scaling == Scaling::tensor ? 2 : 1) * real(x.bytes()), real(written)},
      [&](Backend& backend) {
        kernels::Quantize q;
        q.from = num_of(x.dtype(), "quantize"), q.to = m.num, q.scaling = m.scaling;
        q.rows = m.rows, q.cols = m.cols, q.stride = x.strides()[0], q.x = x.raw();
        const auto pointer = [](const Tensor& t) { return t.defined() ? t.raw() : nullptr; };
        q.data = pointer(m.data), q.scale = pointer(m.scale), q.turned = pointer(m.turned),
        q.turned_scale = pointer(m.turned_scale);
        backend.quantize(q);
      });
}

/// The parts apart, so that each is freed when nobody needs it.
Fp8Matrix quantized(const Tensor& x, Num to, Scaling scaling, bool straight, bool turned) {
  Fp8Matrix m{x.size(0), x.size(1), to, scaling, {}, {}, {}, {}};
  const std::int64_t length = kernels::fp8_padded(scaling, m.rows);
  const auto bytes = [&](std::int64_t n) { return Tensor::empty(Dims{n}, DType::u8, x.device()); };
  if (straight) m.data = bytes(m.rows * m.cols);
  if (straight || scaling == Scaling::tensor) m.scale = bytes(kernels::scale_bytes(scaling, m.rows, m.cols));
  if (turned) m.turned = bytes(m.cols * length);
  if (turned) m.turned_scale = scaling == Scaling::tensor ? m.scale : bytes(kernels::scale_bytes(scaling, m.cols, length));
  quantize(x, m);
  return m;
}

/// A weight's in one run of bytes.
Fp8Matrix carved(const Tensor& bytes, const Dims& shape, Scaling scaling) {
  const kernels::Fp8Places at = kernels::fp8_places(scaling, shape[0], shape[1], true, true);
  const std::int64_t length = kernels::fp8_padded(scaling, shape[0]);
  const auto part = [&](std::int64_t begin, std::int64_t n) { return bytes.narrow(0, begin, n); };
  return {shape[0],
          shape[1],
          Num::f8e4m3,
          scaling,
          part(at.data, shape[0] * shape[1]),
          part(at.scale, kernels::scale_bytes(scaling, shape[0], shape[1])),
          part(at.turned, shape[1] * length),
          part(at.turned_scale, kernels::scale_bytes(scaling, shape[1], length))};
}

/// One side of a product.
struct Side {
  const Fp8Matrix& matrix;
  bool turned;
};

/// c (+)= a b^T (+ bias) (+ residual); c's rows lie close together.
void multiply(const char* name, const Side& a, const Side& b, const Tensor& c, bool accumulate, const Tensor& bias = {},
              const Tensor& residual = {}) {
  const std::int64_t m = c.size(0), n = c.size(1), sums = a.turned ? a.matrix.rows : a.matrix.cols;
  const std::int64_t k = a.turned ? kernels::fp8_padded(a.matrix.scaling, sums) : sums;
  if (k == 0) {  // no rows
    if (!accumulate) c.fill(0);
    return;
  }
  const Cost cost{2 * real(m) * real(n) * real(sums), real((m + n) * k + residual.bytes()), real(c.bytes())};
  run(c.device(), name, cost, [&](Backend& backend) {
    const auto data = [](const Side& s) { return (s.turned ? s.matrix.turned : s.matrix.data).raw(); };
    const auto scale = [](const Side& s) { return (s.turned ? s.matrix.turned_scale : s.matrix.scale).raw(); };
    GemmFp8 g;
    g.a = a.matrix.num, g.b = b.matrix.num, g.c = num_of(c.dtype(), name), g.scaling = a.matrix.scaling;
    g.m = m, g.n = g.ldc = n, g.k = k;
    g.a_scale = scale(a), g.b_scale = scale(b), g.accumulate = accumulate;
    backend.gemm_fp8(g, data(a), data(b), c.raw(), bias.defined() ? bias.raw() : nullptr,
                     residual.defined() ? residual.raw() : nullptr);
  });
}

class LinearFp8Node final : public Node {
 public:
  Tensor x;            // this rank's rows, where ranks share them
  Fp8Matrix x_turned;  // else: all of them
  SharedRows shared;
  Tensor values;
  const Parameter* weight = nullptr;
  LinearPrecision precision;
  std::string_view name() const override { return "linear fp8"; }
  void release() override { x = values = Tensor(), x_turned = {}; }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    const Tensor dy = row_matrix(grads[0]);
    const Scaling scaling = scaling_of(precision);
    const bool input = wants(0, part), weights = wants(1, part);
    std::vector<Tensor> result(4);
    Fp8Matrix g;
    if (input || weights) g = quantized(dy, num(precision.gradient), scaling, input, weights);
    if (input) {
      result[0] = Tensor::empty(Dims{dy.size(0), values.size(1)}, dy.dtype(), dy.device());
      const Fp8Matrix w = carved(fp8_form(*weight, precision), values.shape(), scaling);
      multiply("linear fp8 dx", {g, false}, {w, true}, result[0], false);
      if (shared.scatter) result[0] = shared.scatter(result[0]);
    }
    if (weights) {
      if (shared.gather) x_turned = quantized(row_matrix(shared.gather(x)), Num::f8e4m3, scaling, false, true);
      bool overwrite = true;
      Leaf* to = leaf(1);
      const Tensor dw =
          to != nullptr ? to->accumulate_into(values, overwrite) : Tensor::empty(values.shape(), DType::f32, dy.device());
      multiply("linear fp8 dw", {g, true}, {x_turned, true}, dw, !overwrite);
      if (to != nullptr)
        to->done();
      else
        result[1] = dw.to(values.dtype());
    }
    if (wants(2, part)) {
      const std::int64_t out = values.size(0);
      bool overwrite = true;
      Leaf* to = leaf(2);
      const Tensor db =
          to != nullptr ? to->accumulate_into(Tensor::wrap(nullptr, Dims{out}, dy.dtype(), dy.device(), nullptr), overwrite)
                        : Tensor::empty(Dims{out}, DType::f32, dy.device());
      run(dy.device(), "linear db", {real(dy.numel()), real(dy.bytes()), real(db.bytes())}, [&](Backend& backend) {
        backend.column_sum(num(dy), dy.raw(), dy.size(0), out, dy.strides()[0], num(db), db.raw(), !overwrite);
      });
      if (to != nullptr)
        to->done();
      else
        result[2] = db.to(dy.dtype());
    }
    if (wants(3, part)) result[3] = grads[0];
    return result;
  }
};

}  // namespace

std::int64_t fp8_multiple(const LinearPrecision& precision) { return kernels::fp8_multiple(scaling_of(precision)); }

bool fits_fp8(const LinearPrecision& precision, const Dims& weight) {
  if (!precision.narrow() || weight.size() != 2) return false;
  const std::int64_t unit = fp8_multiple(precision);
  return weight[0] > 0 && weight[1] > 0 && weight[0] % unit == 0 && weight[1] % unit == 0;
}

const Tensor& fp8_form(const Parameter& weight, const LinearPrecision& precision) {
  const Scaling scaling = scaling_of(precision);
  const Dims& shape = weight.local().shape();
  const Dims bytes{kernels::fp8_places(scaling, shape[0], shape[1], true, true).bytes};
  return weight.derived(scaling == Scaling::block ? "mxfp8" : "fp8", bytes, DType::u8,
                        [scaling](const Tensor& values, const Tensor& form) {
                          const Tensor w = row_matrix(values);
                          quantize(w, carved(form, w.shape(), scaling));
                        });
}

Tensor linear_fp8(const Tensor& x, const SharedRows& rows, const Parameter& weight, const Tensor& values, const Tensor& bias,
                  const Tensor& residual, const LinearPrecision& precision) {
  if (x.rank() != 2 || values.rank() != 2 || x.size(1) != values.size(1))
    wrong("linear fp8", "shapes", "x [T, in] and weight [out, in]",
          to_string(x.shape()) + " and " + to_string(values.shape()));
  if (!fits_fp8(precision, values.shape()))
    wrong("linear fp8", "the weight's shape", "multiples of " + std::to_string(fp8_multiple(precision)),
          to_string(values.shape()));
  if (x.dtype() != values.dtype() || (x.dtype() != DType::f32 && x.dtype() != DType::bf16))
    wrong("linear fp8", "element types", "x and weight both f32 or both bf16",
          std::string(name_of(x.dtype())) + " and " + std::string(name_of(values.dtype())));
  const Tensor mine = row_matrix(x), all = rows.gather ? row_matrix(rows.gather(mine)) : mine;
  const std::int64_t t = all.size(0), out = values.size(0);
  const auto like = [&](const char* what, const Tensor& given, const Dims& shape) {
    if (given.defined() && (!(given.shape() == shape) || given.dtype() != x.dtype()))
      wrong("linear fp8", what, to_string(shape) + " of x's element type",
            to_string(given.shape()) + " " + std::string(name_of(given.dtype())));
    return given.defined() ? given.detach().contiguous() : Tensor();
  };
  const Tensor b = like("bias", bias, Dims{out}), add = like("residual", residual, Dims{t, out});

  const Scaling scaling = scaling_of(precision);
  const bool grad = any_requires_grad({&x, &values, &bias, &residual}), keep = values.requires_grad() && !rows.gather;
  const Fp8Matrix w = carved(fp8_form(weight, precision), values.shape(), scaling);
  Fp8Matrix q = quantized(all, Num::f8e4m3, scaling, true, keep);
  const Tensor y = Tensor::empty(Dims{t, out}, x.dtype(), x.device());
  multiply("linear fp8", {q, false}, {w, false}, y, false, b, add);
  if (!grad) return y;
  auto node = std::make_shared<LinearFp8Node>();
  if (rows.gather) node->x = mine;
  if (keep) {
    q.data = Tensor();
    if (scaling == Scaling::block) q.scale = Tensor();
    node->x_turned = std::move(q);
  }
  node->shared = rows, node->values = values.detach(), node->weight = &weight, node->precision = precision;
  Tensor result = y;
  record(node, {&x, &values, &bias, &residual}, {&result});
  return result;
}

}  // namespace capstan::ops
