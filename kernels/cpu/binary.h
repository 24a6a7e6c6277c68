// defines: Broadcast, BinaryOp, binary: a op b over broadcast and strided operands.
#pragma once
#include <capstan/kernels/bf16.h>
#include <kernels/cpu/context.h>

#include <cstdint>

namespace capstan::kernels::cpu {

enum class BinaryOp : std::uint8_t { add, sub, mul, div };

/// The output's shape and, per dimension, the step of each operand in elements (0 where it is repeated).
struct Broadcast {
  int rank = 0;
  std::int64_t shape[6] = {}, a[6] = {}, b[6] = {};
};

/// out is contiguous. T: double, float, bf16.
template <class T>
void binary(Context& ctx, BinaryOp op, const Broadcast& plan, const T* a, const T* b, T* out);

}  // namespace capstan::kernels::cpu
