// defines: num(), num_of(), the kernels' name of an element type; is_row_matrix(), what GEMMs read in place.
#pragma once
#include <capstan/tensor.h>
#include <kernels/backend.h>

#include <string>

namespace capstan::ops {

using kernels::Num;
static_assert(static_cast<int>(DType::f64) == static_cast<int>(Num::f64) && static_cast<int>(DType::boolean) == static_cast<int>(Num::boolean));

/// The kernels' name of an element type.
inline Num num(DType dtype) { return static_cast<Num>(dtype); }
inline Num num(const Tensor& t) { return num(t.dtype()); }

/// The same where only f64, f32 and bf16 will do.
inline Num num_of(DType dtype, const char* op) {
  switch (dtype) {
    case DType::f64:
    case DType::f32:
    case DType::bf16: return num(dtype);
    default: fail(Fault::programming, op, "element type: expected f64, f32 or bf16, got " + std::string(name_of(dtype)));
  }
}

/// Rank 2 with unit column stride: rows may be apart (a column slice of a wider tensor).
inline bool is_row_matrix(const Tensor& t) { return t.rank() == 2 && (t.strides()[1] == 1 || t.shape()[1] == 1); }

/// `t` itself when a GEMM can read it, else a contiguous copy.
inline Tensor row_matrix(const Tensor& t) { return is_row_matrix(t) ? t.detach() : t.detach().contiguous(); }

}  // namespace capstan::ops
