// defines: sums and maxima over CUDA, in orders fixed by the shape alone. Arguments as in kernels/backend.h.
#pragma once
#include <kernels/cuda/context.h>

#include <span>

namespace capstan::kernels::cuda {

void sum_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out);
void spread_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out);
void max_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out);
void max_middle_backward(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m,
                         const void* g, void* da);
void column_sum(Context& ctx, Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* to, bool accumulate);
double sum_of_squares(Context& ctx, std::span<const Piece> pieces);
std::int64_t first_nonfinite(Context& ctx, std::span<const Piece> pieces);
void normalize(Context& ctx, Num num, std::int64_t n, void* x, double least);
/// Reports to ctx.faults() when *x is not 1.
void check_one(Context& ctx, const char* what, Num num, const void* x);

}  // namespace capstan::kernels::cuda
