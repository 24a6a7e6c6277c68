// defines: Tolerance and the one table of how far a result may be from the f64 op on the same inputs.
#pragma once
#include <capstan/dtype.h>

namespace capstan::testing {

/// |got - want| <= relative * |want| + scale * max |want|.
struct Tolerance { double relative, scale; };

/// One op forward or backward against the same op in f64. f32: a few roundings of 6e-8 and sums of up to a
/// few hundred terms. bf16: inputs are exact, sums are f32; what remains is rounding results and saved
/// values to 8 bits (2^-9 each).
constexpr Tolerance tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return {1e-12, 1e-13};
    case DType::f32: return {4e-6, 1e-6};
    default: return {8e-3, 4e-3};
  }
}

/// Analytic against numeric gradients in f64 by the five-point formula with step 1e-3: its truncation is
/// about 1e-12 times the fifth derivative.
constexpr double finite_difference_tolerance = 1e-7;

}  // namespace capstan::testing
