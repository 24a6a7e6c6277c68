// defines: Case, memory_cases(), product_cases(), attention_cases(): what is measured of a device's kernels.
#pragma once
#include "bench/table.h"

#include <capstan/device.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace capstan::bench {

/// One call of one kernel.
struct CAPSTAN_API Case {
  std::string name;
  Bound bound;
  double amount = 0;  ///< bytes (each operand once) or FLOP (the model's) of one call
  /// Makes the operands, random, and returns the call; they live as long as it does.
  std::function<std::function<void()>()> prepare;
  Reference reference = {};
};

/// Whole: shapes of the models that are trained, larger than a GPU's caches. Small: to see that they run.
enum class Size : unsigned char { whole, small };

/// Two buffers, one copied to the other: the first is the limit of what is bound by memory.
CAPSTAN_API Case copy_case(Device& device, Size size);
/// A large square product of `dtype`: the limit of products.
CAPSTAN_API Case square_case(Device& device, Size size, DType dtype);
CAPSTAN_API std::vector<Case> memory_cases(Device& device, Size size);
/// Of linear layers: forward and both gradients, in bf16 and, where the device has them, in fp8; and what products take along.
CAPSTAN_API std::vector<Case> product_cases(Device& device, Size size);
CAPSTAN_API std::vector<Case> attention_cases(Device& device, Size size);

}  // namespace capstan::bench
