// defines: quantize(), gemm_fp8(): fp8 on the CPU, the specification of what GPUs do.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

namespace capstan::kernels::cpu {

/// data[r, c] = fp8(x[r, c] / scale), turned[c, r] likewise, rows past the last 0. With Scaling::tensor both share scale[0];
/// with Scaling::block a scale covers 32 columns of a row in `data`, 32 rows of a column in `turned`. Scales as shared/fp8.h
/// says; those that pad a tile are 0.
void quantize(Context& ctx, const Quantize& q);

/// C = A B^T (+ bias) (+ residual | + C): the dequantized values multiplied and summed in f32, rounded once. Rows of C do
/// not depend on how many there are, nor on the number of threads.
void gemm_fp8(Context& ctx, const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual);

}  // namespace capstan::kernels::cpu
