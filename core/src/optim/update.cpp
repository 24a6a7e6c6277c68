// The optimizers' fused updates: shape checks, then the device's kernel.
#include <capstan/update.h>
#include <kernels/backend.h>

#include <string>

namespace capstan::update {

namespace {

using kernels::Num;

Num num(const Tensor& t) { return static_cast<Num>(t.dtype()); }

[[noreturn]] void wrong(const char* op, const std::string& what) { fail(Fault::programming, op, what); }

void check_value(const char* op, const Tensor& value) {
  if (!value.defined() || (value.dtype() != DType::f32 && value.dtype() != DType::f64)) wrong(op, "values: expected f32 or f64");
}

/// Of value's shape, device and, when `same`, element type.
void check_flat(const char* op, const char* what, const Tensor& t, const Tensor& value, bool same) {
  if (!t.defined() || !t.is_contiguous() || !(t.shape() == value.shape()) || &t.device() != &value.device())
    wrong(op, std::string(what) + ": expected contiguous " + to_string(value.shape()) + " on the values' device, got " + (t.defined() ? to_string(t.shape()) : "none"));
  if (same ? t.dtype() != value.dtype() : t.dtype() != DType::f32 && t.dtype() != value.dtype())
    wrong(op, std::string(what) + ": element type: expected " + std::string(name_of(value.dtype())) + (same ? "" : " or f32") + ", got " + std::string(name_of(t.dtype())));
}

void check_rows(const char* op, const char* what, const Tensor& t, const Tensor& like, bool same) {
  if (!t.defined() || t.rank() != 2 || !(t.shape() == like.shape()) || (t.strides()[1] != 1 && t.shape()[1] != 1) || &t.device() != &like.device())
    wrong(op, std::string(what) + ": expected a matrix " + to_string(like.shape()) + " with adjacent columns, got " + (t.defined() ? to_string(t.shape()) : "none"));
  if (same && t.dtype() != like.dtype()) wrong(op, std::string(what) + ": element type: expected " + std::string(name_of(like.dtype())) + ", got " + std::string(name_of(t.dtype())));
}

}  // namespace

void adamw(const AdamW& step, const Tensor& value, const Tensor& grad, const Tensor& m, const Tensor& v) {
  check_value("adamw", value);
  check_flat("adamw", "value", value, value, true);
  check_flat("adamw", "gradient", grad, value, true);
  check_flat("adamw", "m", m, value, false);
  check_flat("adamw", "v", v, value, false);
  if (m.dtype() != v.dtype()) wrong("adamw", "m and v: expected one element type");
  if (value.is_meta()) return;
  const kernels::AdamWStep s{step.grad_scale, step.keep, step.rate, step.beta1_rest, step.beta2, step.beta2_rest, step.v_scale, step.epsilon};
  value.device().backend().adamw(s, num(value), num(m), value.numel(), value.raw(), grad.raw(), m.raw(), v.raw());
}

void sgd(const Sgd& step, const Tensor& value, const Tensor& grad, const Tensor& buffer) {
  check_value("sgd", value);
  check_flat("sgd", "value", value, value, true);
  check_flat("sgd", "gradient", grad, value, true);
  if (buffer.defined()) check_flat("sgd", "momentum", buffer, value, false);
  if (value.is_meta()) return;
  const kernels::SgdStep s{step.grad_scale, step.decay, step.momentum, step.lr, step.nesterov};
  value.device().backend().sgd(s, num(value), buffer.defined() ? num(buffer) : num(value), value.numel(), value.raw(), grad.raw(), buffer.defined() ? buffer.raw() : nullptr);
}

Tensor momentum(const Tensor& grad, const Tensor& buffer, double grad_scale, double mu, bool nesterov) {
  check_value("momentum", grad);
  check_rows("momentum", "gradient", grad, grad, true);
  check_rows("momentum", "buffer", buffer, grad, false);
  if (buffer.dtype() != DType::f32 && buffer.dtype() != grad.dtype()) wrong("momentum", "buffer: element type: expected f32 or the gradient's, got " + std::string(name_of(buffer.dtype())));
  if (grad.size(0) > 1 && grad.strides()[0] != buffer.strides()[0]) wrong("momentum", "the rows of gradient and buffer are not equally far apart");
  Tensor direction = Tensor::empty(grad.shape(), grad.dtype(), grad.device());
  if (grad.is_meta()) return direction;
  const kernels::MomentumStep s{grad_scale, mu, nesterov};
  grad.device().backend().momentum(s, num(grad), num(buffer), grad.size(0), grad.size(1), grad.strides()[0], grad.raw(), buffer.raw(), direction.raw());
  return direction;
}

void axpby(double a, const Tensor& x, double b, const Tensor& y, const Tensor& out) {
  check_value("axpby", out);
  check_rows("axpby", "out", out, out, true);
  check_rows("axpby", "x", x, out, true);
  if (y.defined()) check_rows("axpby", "y", y, out, true);
  if (out.is_meta()) return;
  out.device().backend().axpby(num(out), out.size(0), out.size(1), a, x.raw(), x.strides()[0], b, y.defined() ? y.raw() : nullptr,
                               y.defined() ? y.strides()[0] : 0, out.raw(), out.strides()[0]);
}

void normalize(const Tensor& x, double least) {
  check_value("normalize", x);
  if (!x.is_contiguous()) wrong("normalize", "expected a contiguous tensor");
  if (!x.is_meta()) x.device().backend().normalize(num(x), x.numel(), x.raw(), least);
}

}  // namespace capstan::update
