// defines: random: elements of a random stream by address.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

namespace capstan::kernels::cpu {

/// T: double, float, bf16.
template <class T> void random(Context& ctx, const RandomFill& fill, std::int64_t n, T* to);

}  // namespace capstan::kernels::cpu
