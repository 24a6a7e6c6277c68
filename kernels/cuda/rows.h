// defines: the row kernels: norms, softmax, rows by id, scores. Arguments as in kernels/backend.h.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

std::int64_t norm_blocks(Context& ctx, std::int64_t rows, std::int64_t cols);
void norm(Context& ctx, Num num, const NormRows& n);
void norm_backward(Context& ctx, Num num, const NormRowsBackward& n);
void softmax(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm);
void softmax_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm);

/// Reports the first id outside [low, high) to ctx.faults() under `what`.
void check_ids(Context& ctx, const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high);
void gather_rows(Context& ctx, std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out);
void scatter_add_rows(Context& ctx, Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g,
                      std::int64_t table_rows, Num table_num, void* table, bool overwrite);
/// `rows` on the device.
void store_pages(Context& ctx, Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                 std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages);

void score_rows(Context& ctx, const ScoreRows& s);
void score_rows_backward(Context& ctx, const ScoreRows& s);
void weighted_sum(Context& ctx, Num compute, std::int64_t n, const float* weights, const void* logprob, void* out);

}  // namespace capstan::kernels::cuda
