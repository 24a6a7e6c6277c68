// defines: rope_table, rope: rotary position embedding in the half-split layout.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// table [rows, size]: size/2 cosines, then size/2 sines, of positions[t] * theta^(-2i/size). T: double, float.
template <class T>
void rope_table(Context& ctx, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, T* table);

/// y[t, h, :] = x[t, h, :] turned by row t of `table`, or turned back when `inverse`. Rows of x are
/// `stride` elements apart, y is contiguous [rows, heads, size]. T: double, float, bf16.
template <class T>
void rope(Context& ctx, std::int64_t rows, std::int64_t heads, std::int64_t size, const T* x, std::int64_t stride,
          const Compute<T>* table, T* y, bool inverse);

}  // namespace capstan::kernels::cpu
