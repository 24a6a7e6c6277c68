// defines: Gemm, gemm(): matrix products over oneDNN (f32, bf16), own register tiles where it does not keep
// rows apart, and a plain reference (f64).
#pragma once
#include <kernels/cpu/context.h>

#include <cstdint>

namespace capstan::kernels::cpu {

enum class Num : std::uint8_t { f64, f32, bf16 };

/// C[M,N] = op(A)[M,K] op(B)[K,N] (+ bias[N]) (+ C when accumulate); `batch` products `stride_*` elements
/// apart. Row-major; lda is the row stride of A as stored ([M,K], or [K,M] when trans_a). Sums in f32 (f64).
/// A row of C has the same bits whatever M is and however many threads run, when `invariant` is set
/// (forward products); gradients leave it off and take the fastest path.
struct Gemm {
  Num a = Num::f32, b = Num::f32, c = Num::f32;
  bool trans_a = false, trans_b = false;
  std::int64_t m = 0, n = 0, k = 0, lda = 0, ldb = 0, ldc = 0;
  std::int64_t batch = 1, stride_a = 0, stride_b = 0, stride_c = 0;
  bool accumulate = false;
  bool bias = false;  ///< f32 (f64 in f64 products)
  bool invariant = false;
};

void gemm(Context& context, const Gemm& g, const void* a, const void* b, void* c, const void* bias = nullptr);

}  // namespace capstan::kernels::cpu
