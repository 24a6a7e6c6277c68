// defines: check_rows(), gather_checked(): the two halves of gather, for ids of which some are nobody's.
#pragma once
#include <capstan/export.h>
#include <capstan/tensor.h>

namespace capstan::ops {

/// Error(programming) that names the first of i32 `ids` outside [0, rows); on a GPU the next wait throws instead.
CAPSTAN_API void check_rows(const char* op, const Tensor& ids, std::int64_t rows);

/// Rows of `table` [n, ...] at i32 `ids` [m], each below n: [m, ...]. Where an id is below 0 the row is zero, and adds nothing to
/// the table's gradient. `op`: under which its cost and errors go. Error(programming) on shapes and element types.
CAPSTAN_API Tensor gather_checked(const char* op, const Tensor& table, const Tensor& ids);

}  // namespace capstan::ops
