// defines: adamw, sgd, momentum, axpby, normalize, and the reductions over gradients. Every element stands alone, or
// sums run in fixed blocks, so threads do not show in the result.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

#include <span>

namespace capstan::kernels::cpu {

// T (values, gradients, arithmetic), S (state): float/float, double/double, double/float.
template <class T, class S> void adamw(Context& ctx, const AdamWStep& step, std::int64_t n, T* value, const T* grad, S* m, S* v);
template <class T, class S> void sgd(Context& ctx, const SgdStep& step, std::int64_t n, T* value, const T* grad, S* buffer);
template <class T, class S>
void momentum(Context& ctx, const MomentumStep& step, std::int64_t rows, std::int64_t cols, std::int64_t stride, const T* grad, S* buffer, T* direction);

template <class T>
void axpby(Context& ctx, std::int64_t rows, std::int64_t cols, double a, const T* x, std::int64_t x_stride, double b, const T* y,
           std::int64_t y_stride, T* out, std::int64_t out_stride);
/// Blocks of 4096 elements in f64, then the blocks in order.
template <class T> void normalize(Context& ctx, std::int64_t n, T* x, double least);

/// Fixed blocks of 65536 elements of each piece over 16 lanes, in order.
double sum_of_squares(Context& ctx, std::span<const Piece> pieces);
std::int64_t first_nonfinite(Context& ctx, std::span<const Piece> pieces);

}  // namespace capstan::kernels::cpu
