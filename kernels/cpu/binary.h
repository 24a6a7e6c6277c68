// defines: binary: a op b over broadcast and strided operands.
#pragma once
#include <capstan/kernels/bf16.h>
#include <kernels/cpu/context.h>
#include <kernels/types.h>

#include <cstdint>

namespace capstan::kernels::cpu {

using kernels::BinaryOp;
using kernels::Broadcast;

/// out is contiguous. T: double, float, bf16.
template <class T>
void binary(Context& ctx, BinaryOp op, const Broadcast& plan, const T* a, const T* b, T* out);

}  // namespace capstan::kernels::cpu
