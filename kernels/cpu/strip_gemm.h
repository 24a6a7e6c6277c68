// defines: strip_gemm(): f32 products from A in packed strips, for CPUs with AVX2. Internal to kernels/cpu.
#pragma once
#include <kernels/cpu/gemm.h>

namespace capstan::kernels::cpu {

/// What panel_gemm() does (its contract holds), both operands packed: A in strips that stay in the second-level cache, B in
/// panels that come from the third. In builds with AVX2 and without AVX-512.
void strip_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias, const float* residual);

}  // namespace capstan::kernels::cpu
