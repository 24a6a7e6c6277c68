// defines: what a recipe's `precision:` comes to: linear_precision(), check_precision(), describe_precision().
#pragma once
#include "train/estimate.h"
#include "train/session.h"

#include <string>

namespace capstan::train {

/// precision.linear and precision.linear_gradient.
LinearPrecision linear_precision(const Options& options);

/// Throws Error(input) when no linear layer of the model has dimensions that allow what precision.linear asks, or (`here`)
/// when the session's device cannot multiply so.
void check_precision(const Session& session, bool here);

/// "bf16, linear layers in fp8 (e4m3, gradients e5m2)", and which linear layers are not: those whose dimensions do not allow
/// it on this mesh.
CAPSTAN_API std::string describe_precision(const Session& session);

/// FLOP/s of the products that a step is made of, all at the rate that large products of their kind reach on the session's
/// device: what its speed is held against. On the CPU that of f32 throughout, which fp8 is computed in there.
struct ProductRate {
  double rate = 0;
  std::string what;  ///< "" or ", 61% of them in fp8 at ..."
};
CAPSTAN_API ProductRate measure_products(const Session& session, const Estimate& estimate);

}  // namespace capstan::train
