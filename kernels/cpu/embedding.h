// defines: local_ids; gather_rows and scatter_add_rows, its deterministic transpose.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// The first index t with ids[t] outside [0, limit), or -1.
std::int64_t first_outside(std::int64_t count, const std::int32_t* ids, std::int64_t limit);

/// What ids of a whole table are in rows [begin, begin + rows) of it: local[t] = ids[t] - begin where that is one of them, else
/// -1. Null, or of [count]: mine[t] = 1 where they have the id, others[t] = 1 where they have not and it is not below 0; else 0.
/// T: float, double.
template <class T>
void local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, T* mine, T* others);

/// out[t, :] = table[ids[t], :], rows of `row_bytes`; 0 where ids[t] is below 0.
void gather_rows(Context& ctx, std::int64_t count, std::int64_t row_bytes, const void* table, const std::int32_t* ids, void* out);

/// table[v, :] += sum over t with ids[t] = v of g[t, :], in order of t, summed in the compute type; where ids[t] is below 0,
/// g[t, :] goes nowhere. When `overwrite` the table's contents are ignored: rows that no id names become 0. A table row belongs
/// to one thread. T of g, Out of the table: double/double, float or bf16 / float or bf16.
template <class T, class Out>
void scatter_add_rows(Context& ctx, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const T* g,
                      std::int64_t table_rows, Out* table, bool overwrite);

}  // namespace capstan::kernels::cpu
