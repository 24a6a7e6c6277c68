// defines: copy, fill: strided, casting, on the context's threads.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

namespace capstan::kernels::cpu {

/// to[...] = from[...], cast; both may be strided, but not overlap.
void copy(Context& ctx, const Strided& shape, Num to_num, void* to, Num from_num, const void* from);

/// Every element that `shape` names on its `to` side.
void fill(Context& ctx, const Strided& shape, Num num, void* to, double value);

}  // namespace capstan::kernels::cpu
