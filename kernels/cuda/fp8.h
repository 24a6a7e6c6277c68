// defines: quantizers to fp8 and products of fp8 matrices over CUDA. Arguments as in kernels/backend.h.
#pragma once
#include <kernels/cuda/context.h>

#include <string>

namespace capstan::kernels::cuda {

void quantize(Context& ctx, const Quantize& q);
void gemm_fp8(Context& ctx, const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual);
std::string fp8_problem(Context& ctx, Scaling scaling);
/// FLOP/s of a large e4m3 product with one scale a matrix, the best of a few.
double gemm_rate_fp8(Context& ctx);

}  // namespace capstan::kernels::cuda
