// defines: Tolerance, Bound and the one table of how far results may be from what they are compared with.
#pragma once
#include <capstan/dtype.h>

#include <cmath>
#include <cstdint>

namespace capstan::bounds {

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

/// One number for each dtype of what is computed. A rounding is 1.1e-16 in f64, 6e-8 in f32, 2^-9 in bf16.
struct Bound {
  double f64, f32, bf16 = 0;  ///< bf16: 0 where no test asks
  constexpr double operator()(DType dtype) const { return dtype == DType::f64 ? f64 : dtype == DType::f32 ? f32 : bf16; }
};

/// The objective of a batch against f64, relative: some tens of scores of one sign, each within tolerance_of(f32). bf16 as
/// f32: its inputs are exact and scores are f32.
constexpr Bound objective{1e-12, 1e-5, 1e-5};

/// Values of about 1 after ten updates against the rule written out in f64, absolute: two roundings of the value in each, and
/// those of moments that move it by a few hundredths.
constexpr Bound ten_updates{1e-14, 2e-6};
/// The same after the eight updates of the stored PyTorch numbers.
constexpr Bound eight_updates{1e-14, 1e-6};

/// Gradients of attention whose keys several ranks hold, norm of the difference over norm: each sum over keys is taken in a few
/// parts. bf16: each part is rounded.
constexpr Bound attention_parts{1e-13, 1e-6, 1e-2};

/// A step in which sums of up to a few thousand terms run in another order (microbatches, parts of a layer, stages), relative:
/// a random walk of 1e2 roundings through some layers.
constexpr Bound reordered{1e-12, 1e-5};
/// Gradients of a whole model on a mesh, norm of the difference over that of the array, or over a thousandth of the norm of all
/// where that is larger: as above, and f64 has room for arrays that are nearly 0.
constexpr Bound mesh{1e-10, 1e-5};
/// Losses in nats, step after step, when each step differs as above: updates carry the difference on. f32 is the contract's 1e-4.
constexpr Bound curve{1e-10, 1e-4};

/// An element of an f32 product over k terms of about 1: partial sums walk to sqrt(k), and their roundings add up to
/// 6e-8 * k / sqrt(2), which stays below a fifth of this up to k of some thousands.
inline double product(std::int64_t k) { return 1e-5 * std::sqrt(static_cast<double>(k)); }

/// Analytic against numeric gradients in f64 by the five-point formula with step 1e-3: its truncation is
/// about 1e-12 times the fifth derivative.
constexpr double finite_difference_tolerance = 1e-7;

}  // namespace capstan::bounds
