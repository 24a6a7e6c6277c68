// defines: norm and norm_backward over rows (NormRows, NormRowsBackward): one read and one write of each row.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>
#include <kernels/types.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// Rows whose weight gradients one task sums; a function of the row count alone, so that the sum's order
/// does not depend on threads. At most 256 blocks.
std::int64_t norm_block_rows(std::int64_t rows);

/// T: double, float, bf16.
template <class T>
void norm(Context& ctx, const NormRows& n);
template <class T>
void norm_backward(Context& ctx, const NormRowsBackward& n);

}  // namespace capstan::kernels::cpu
