// defines: rms_norm, layer_norm and their backwards: one read and one write of each row.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// Rows whose weight gradients one task sums; a function of the row count alone, so that the sum's order
/// does not depend on threads. At most 256 blocks.
std::int64_t norm_block_rows(std::int64_t rows);

/// y = x r w with r = 1 / sqrt(mean(x^2) + epsilon); `inverse` [rows] keeps r. T: double, float, bf16.
template <class T>
void rms_norm(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const Compute<T>* w, double epsilon, T* y,
              Compute<T>* inverse);

/// dx = r (g w - x^ mean(g w x^)), x^ = x r; `partial` [blocks, cols] gets each block's sum of g x^. Either
/// may be null.
template <class T>
void rms_norm_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const Compute<T>* w,
                       const Compute<T>* inverse, const T* g, T* dx, Compute<T>* partial);

/// y = (x - mean) r w + b with r = 1 / sqrt(var + epsilon); b may be null; `mean` and `inverse` [rows].
template <class T>
void layer_norm(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const Compute<T>* w, const Compute<T>* b,
                double epsilon, T* y, Compute<T>* mean, Compute<T>* inverse);

/// dx = r (g w - mean(g w) - x^ mean(g w x^)), x^ = (x - mean) r; `partial_w` and `partial_b` [blocks,
/// cols] get each block's sums of g x^ and g. dx, partial_w and partial_b may be null.
template <class T>
void layer_norm_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const Compute<T>* w,
                         const Compute<T>* mean, const Compute<T>* inverse, const T* g, T* dx, Compute<T>* partial_w,
                         Compute<T>* partial_b);

}  // namespace capstan::kernels::cpu
