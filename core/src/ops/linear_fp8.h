// defines: linear_fp8(): linear() with operands in fp8; fits_fp8(), which shapes it takes; fp8_form(), a weight's cached
// copy.
#pragma once
#include "ops/linear_shared.h"

#include <capstan/model.h>
#include <capstan/parameter.h>
#include <capstan/tensor.h>

#include <cstdint>

namespace capstan::ops {

/// What both dimensions of a weight must be multiples of: 16 (fp8), 32 (mxfp8).
std::int64_t fp8_multiple(const LinearPrecision& precision);

/// Whether a weight [out, in] is multiplied in fp8: the precision asks for it and both dimensions allow it.
bool fits_fp8(const LinearPrecision& precision, const Dims& weight);

/// The weight's values in fp8, straight and turned, with their scales: bytes as kernels' fp8_places() lays them out. Made
/// once for each version of the values.
const Tensor& fp8_form(const Parameter& weight, const LinearPrecision& precision);

/// linear_of_shared_rows(x, rows, weight, bias, residual) with x, the weight and the gradient of y rounded to fp8. `values`
/// are the weight's, with its leaf when it needs a gradient. x is kept in fp8, or as it is where ranks share its rows.
/// Gradients of the weight are f32 and go into its leaf; those of the bias are not rounded.
Tensor linear_fp8(const Tensor& x, const SharedRows& rows, const Parameter& weight, const Tensor& values, const Tensor& bias,
                  const Tensor& residual, const LinearPrecision& precision);

}  // namespace capstan::ops
