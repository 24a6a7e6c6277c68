// defines: what ops share: shape checks with tagged messages, cost scopes,
// run(), and compute types.
#pragma once
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/device.h>
#include <capstan/tensor.h>
#include <kernels/backend.h>

#include <memory>
#include <string>

namespace capstan::ops {

using kernels::Backend;

/// Throws "[op] what: expected ..., got ...".
[[noreturn]] inline void wrong(const char* op, const std::string& what, const std::string& expected, const std::string& got) {
  fail(Fault::programming, op, what + ": expected " + expected + ", got " + got);
}

/// Defined and of an element type that devices compute in.
inline void check_floating(const char* op, const char* what, const Tensor& t) {
  if (!t.defined()) wrong(op, what, "a tensor", "an undefined one");
  if (t.dtype() != DType::f64 && t.dtype() != DType::f32 && t.dtype() != DType::bf16)
    wrong(op, std::string(what) + "'s element type", "f64, f32 or bf16", std::string(name_of(t.dtype())));
}

/// `t` lies where `x` does; `t` is defined.
inline void check_device(const char* op, const char* what, const Tensor& t, const Tensor& x) {
  if (!t.defined()) wrong(op, what, "a tensor", "an undefined one");
  if (t.device().kind() != x.device().kind())
    wrong(op, std::string(what) + "'s device", std::string(x.device().name()), std::string(t.device().name()));
}

/// The same element type and device as x.
inline void check_like(const char* op, const char* what, const Tensor& t, const Tensor& x) {
  check_floating(op, what, t);
  check_device(op, what, t, x);
  if (t.dtype() != x.dtype())
    wrong(op, std::string(what) + "'s element type", std::string(name_of(x.dtype())) + " (use cast)", std::string(name_of(t.dtype())));
}

inline void check_shape(const char* op, const char* what, const Tensor& t, const Dims& expected) {
  if (!(t.shape() == expected)) wrong(op, std::string(what) + "'s shape", to_string(expected), to_string(t.shape()));
}

/// Integers of one dimension, [count].
inline void check_ids(const char* op, const char* what, const Tensor& t, DType dtype, const Tensor& x) {
  check_device(op, what, t, x);
  if (t.dtype() != dtype) wrong(op, std::string(what) + "'s element type", std::string(name_of(dtype)), std::string(name_of(t.dtype())));
  if (t.rank() != 1) wrong(op, std::string(what) + "'s shape", "one dimension", to_string(t.shape()));
}

/// Dimension `dim` of t as 0 <= d < rank.
inline int dimension(const char* op, const Tensor& t, int dim) {
  const int d = dim < 0 ? dim + t.rank() : dim;
  if (d < 0 || d >= t.rank())
    wrong(op, "dimension", "one of " + std::to_string(t.rank()) + " of shape " + to_string(t.shape()), std::to_string(dim));
  return d;
}

/// What sums of `dtype` run in.
inline DType compute_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// The op's work: charged to the device's ledger, skipped on the meta device. `work` is called with the device's kernels.
template <class F>
void run(Device& device, std::string_view name, Cost cost, F&& work) {
  OpScope scope(device, name, cost);
  if (!scope.meta()) work(device.backend());
}

inline double real(std::int64_t n) { return static_cast<double>(n); }

/// A gradient as an op reads it: contiguous, in the output's element type.
inline Tensor incoming(const Tensor& grad, DType dtype) { return grad.detach().to(dtype).contiguous(); }

/// A parameter's gradient may stay in the compute type (leaves keep f32); an activation's takes its own.
inline Tensor outgoing(const Node& node, int input, const Tensor& grad, DType dtype) {
  return node.leaf(input) != nullptr ? grad : grad.to(dtype);
}

/// [rows, cols] of a tensor whose last dimension is cols; a scalar is one row of one.
struct Rows { std::int64_t rows = 0, cols = 0; };
inline Rows rows_of(const Tensor& t) {
  const std::int64_t cols = t.rank() == 0 ? 1 : t.size(-1);
  return {cols == 0 ? 0 : t.numel() / cols, cols};
}

/// `t` summed to `shape`, a shape that broadcasts to t's; itself when they are equal. In t's element type.
Tensor sum_to(const Tensor& t, const Dims& shape);

}  // namespace capstan::ops
