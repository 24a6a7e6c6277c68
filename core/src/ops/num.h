// defines: num_of(), the kernels' name of an element type; is_row_matrix(), what GEMMs read in place.
#pragma once
#include <capstan/tensor.h>
#include <kernels/cpu/gemm.h>

#include <string>

namespace capstan::ops {

inline kernels::cpu::Num num_of(DType dtype, const char* op) {
  switch (dtype) {
    case DType::f64: return kernels::cpu::Num::f64;
    case DType::f32: return kernels::cpu::Num::f32;
    case DType::bf16: return kernels::cpu::Num::bf16;
    default: fail(Fault::programming, op, "element type: expected f64, f32 or bf16, got " + std::string(name_of(dtype)));
  }
}

/// Rank 2 with unit column stride: rows may be apart (a column slice of a wider tensor).
inline bool is_row_matrix(const Tensor& t) { return t.rank() == 2 && (t.strides()[1] == 1 || t.shape()[1] == 1); }

/// `t` itself when a GEMM can read it, else a contiguous copy.
inline Tensor row_matrix(const Tensor& t) { return is_row_matrix(t) ? t.detach() : t.detach().contiguous(); }

}  // namespace capstan::ops
