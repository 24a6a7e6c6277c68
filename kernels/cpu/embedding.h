// defines: gather_rows and scatter_add_rows, its deterministic transpose.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// The first index t with ids[t] outside [0, limit), or -1.
std::int64_t first_outside(std::int64_t count, const std::int32_t* ids, std::int64_t limit);

/// out[t, :] = table[ids[t], :], rows of `row_bytes`.
void gather_rows(Context& ctx, std::int64_t count, std::int64_t row_bytes, const void* table, const std::int32_t* ids, void* out);

/// table[v, :] += sum over t with ids[t] = v of g[t, :], in order of t, summed in the compute type. When
/// `overwrite` the table's contents are ignored: rows that no id names become 0. A table row belongs to one
/// thread. T of g, Out of the table: double/double, float or bf16 / float or bf16.
template <class T, class Out>
void scatter_add_rows(Context& ctx, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const T* g,
                      std::int64_t table_rows, Out* table, bool overwrite);

}  // namespace capstan::kernels::cpu
