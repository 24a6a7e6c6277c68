// defines: gelu, silu, swiglu and their backwards over flat arrays and rows.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>
#include <kernels/shared/elements.h>

#include <cstdint>

namespace capstan::kernels::cpu {

// T: double, float, bf16; n elements.
template <class T> void gelu(Context& ctx, std::int64_t n, const T* x, T* y);
template <class T> void gelu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx);
/// dx = g * gelu'(x) over [rows, cols] and sum[c] (+)= sum_r dx[r, c], rows added in order whatever the number of threads.
template <class T>
void gelu_backward_sum(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const T* g, T* dx, Compute<T>* sum, bool accumulate);
template <class T> void silu(Context& ctx, std::int64_t n, const T* x, T* y);
template <class T> void silu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx);

/// gate_up [rows, 2 width] -> y [rows, width].
template <class T> void swiglu(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, T* y);
/// g [rows, width] -> dx [rows, 2 width].
template <class T>
void swiglu_backward(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, const T* g, T* dx);

}  // namespace capstan::kernels::cpu
