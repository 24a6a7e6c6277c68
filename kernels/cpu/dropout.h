// defines: dropout: a mask by address, regenerated whenever it is needed.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// y[t, c] = x[t, c] / (1 - p) where the uniform at index sample_ids[t] * cols + c of the stream (key, step)
/// is at least p, else 0. Its own backward. T: double, float, bf16.
template <class T>
void dropout(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x, const std::int64_t* sample_ids, double p,
             std::uint64_t key, std::uint64_t step, T* y);

/// The 32 numbers philox_u32(key, step, 4 block) .. philox_u32(key, step, 4 block + 31).
void philox_32(std::uint64_t key, std::uint64_t step, std::uint64_t block, std::uint32_t* out);

}  // namespace capstan::kernels::cpu
