// defines: sum_middle, max_middle, scan_middle, sum_flat and their backwards: reductions whose order depends on the
// reduced extent alone.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// out[o, i] = factor * sum over j of a[o, j, i]; a [outer, n, inner]. T: double, float, bf16; Out: T or
/// its compute type. Rows (inner = 1) sum as in sum_blocks; columns in blocks of 64, blocks in order.
template <class T, class Out>
void sum_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, Compute<T> factor, Out* out);

/// out[o, j, i] = factor * g[o, i]
template <class T>
void spread_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* g, Compute<T> factor, T* out);

/// The largest over j; NaN if there is one.
template <class T>
void max_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, T* out);

/// da[o, j, i] = g[o, i] at the first j with a[o, j, i] = m[o, i], 0 elsewhere.
template <class T>
void max_middle_backward(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, const T* m,
                         const T* g, T* da);

/// out[o, j, i] = the sum of a[o, k, i] over k <= j, or k >= j when `reverse`: one after the other in the compute type.
template <class T>
void scan_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, bool reverse, T* out);

/// Sum of n elements: blocks of 4096, then the blocks' sums.
template <class T>
Compute<T> sum_flat(Context& ctx, std::int64_t n, const T* a);

}  // namespace capstan::kernels::cpu
