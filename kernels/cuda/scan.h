// defines: running sums over CUDA, in orders fixed by the shape alone.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

/// As Backend::scan_middle.
void scan_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out);

}  // namespace capstan::kernels::cuda
