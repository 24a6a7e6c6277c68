// defines: panel_gemm(): f32 products from packed panels of B, for CPUs with AVX-512 or AVX2. Internal to kernels/cpu.
#pragma once
#include <kernels/cpu/gemm.h>

namespace capstan::kernels::cpu {

/// Whether this build has it and it serves `g`: f32, one product, A as stored or (without bias) A transposed.
bool has_panel_gemm(const Gemm& g);
/// Whether to prefer it to the library where rows need not be invariant.
bool panels_are_better(const Gemm& g);

/// Whether strip_gemm() does this product (here and in gemm()), and so takes g.gelu_slope_of and, with A transposed, g.sums_of_a.
bool strips_serve(const Gemm& g);

/// C = op(A) op(B) (+ C, or without `accumulate` and with A as stored + residual, its rows ldc apart) (+ bias). Every
/// element is summed over k by fma in blocks whose bounds depend on k alone; the blocks' sums are added in order: its bits
/// depend on its row of A and its column of B only, not on m, n or the threads. With g.before_gelu (A as stored) the sum goes
/// there and C is its GELU; with g.gelu_slope_of C is the sum times the slope; g.sums_of_a sums a column of A over each block of
/// k, 16 at a time, and adds the blocks in order.
void panel_gemm(Context& context, const Gemm& g, const float* a, const float* b, float* c, const float* bias,
                const float* residual = nullptr);

}  // namespace capstan::kernels::cpu
