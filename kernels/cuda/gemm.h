// defines: gemm() and gemm_fp8() over cuBLASLt, the rates of large products.
#pragma once
#include <kernels/cuda/product.h>

#include <string>

namespace capstan::kernels::cuda {

/// C = op(A) op(B) (+ bias) (+ residual | + C), rows as in Gemm. bias [N] and residual [M, N] in c's type. With
/// g.before_gelu C is the GELU of that: in the product's epilogue for bf16 where the library has one (N a multiple of 8,
/// both results on 16 bytes), of the sums before they are rounded; else in a kernel of its own, of what was stored. So with
/// g.gelu_slope_of.
void gemm(Context& ctx, const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual);

/// bf16 to f32: the epilogue's sums are f32, rounded nowhere. A pass of our own where the library has no such algorithm.
bool takes_sums_of_a(const Gemm& g);
/// bf16, one product, rows of C close together and a multiple of 8 long.
bool takes_gelu_slope(const Gemm& g);

void gemm_fp8(Context& ctx, const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual);
std::string fp8_problem(Context& ctx, Scaling scaling);

/// FLOP/s of large square products, the best of a few: as large as keeps the device busy for a while. Throws
/// std::runtime_error where its memory has no room for them.
double gemm_rate(Context& ctx, Num num);
/// The same of e4m3 with one scale a matrix.
double gemm_rate_fp8(Context& ctx);

}  // namespace capstan::kernels::cuda
