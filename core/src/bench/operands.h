// defines: Operands: random tensors for measured kernels.
#pragma once
#include <capstan/tensor.h>
#include <kernels/backend.h>

#include <cstdint>

namespace capstan::bench {

/// Values are random: a chip does less work on zeros.
inline Tensor random_tensor(Device& device, const Dims& shape, DType dtype, std::uint64_t key, double spread = 1) {
  Tensor t = Tensor::empty(shape, dtype, device);
  kernels::RandomFill fill;
  fill.key = key, fill.scale = spread;
  device.backend().random(static_cast<kernels::Num>(dtype), fill, t.numel(), t.raw());
  return t;
}

/// Rows that two shapes of a case have.
inline std::int64_t fewer(bool small, std::int64_t n, std::int64_t few) { return small ? few : n; }

inline double real(std::int64_t n) { return static_cast<double>(n); }

}  // namespace capstan::bench
