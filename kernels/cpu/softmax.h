// defines: softmax, log_softmax and their backwards, over rows.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// y = e^(x - max) / sum, or x - max - log sum when `logarithm`. x, y [rows, cols]. T: double, float, bf16.
template <class T>
void softmax(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, T* y, bool logarithm);

/// From the saved y: dx = y (g - sum(g y)), or g - e^y sum(g) when `logarithm`.
template <class T>
void softmax_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* y, const T* g, T* dx, bool logarithm);

}  // namespace capstan::kernels::cpu
