// defines: the element functions that are ours, for any V with arithmetic, fma, min, exp, tanh and sigmoid: vectors on the
// CPU (Vec<T>), one number on a GPU (Lane<T>). One formula for both.
#pragma once
#include <capstan/kernels/bf16.h>

#if defined(__CUDACC__)
#define CAPSTAN_ELEMENT __host__ __device__ __forceinline__
#else
#define CAPSTAN_ELEMENT inline __attribute__((always_inline))
#endif

namespace capstan::kernels {

template <class V> CAPSTAN_ELEMENT V constant(double c) { return V(static_cast<typename V::Scalar>(c)); }

/// 0.5 x (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))), computed as x sigmoid(2 sqrt(2/pi)(...)): the same
/// function without the cancellation at negative x.
template <class V>
CAPSTAN_ELEMENT V gelu_of(V x) {
  const V cubic = fma(x * x, constant<V>(0.044715), constant<V>(1));
  return x * sigmoid(constant<V>(1.5957691216057308) * x * cubic);
}
template <class V>
CAPSTAN_ELEMENT V gelu_slope(V x) {
  const V one = constant<V>(1), square = min(x * x, constant<V>(1e30));  // the bound keeps 0 * inf out where the slope is 0 or 1
  const V s = sigmoid(constant<V>(1.5957691216057308) * x * fma(square, constant<V>(0.044715), one));
  const V inner = constant<V>(1.5957691216057308) * fma(square, constant<V>(3 * 0.044715), one);
  return fma(x * s * (one - s), inner, s);
}
template <class V> CAPSTAN_ELEMENT V silu_of(V x) { return x * sigmoid(x); }
template <class V>
CAPSTAN_ELEMENT V silu_slope(V x) {
  const V one = constant<V>(1), s = sigmoid(x);
  return s * fma(x, one - s, one);
}
/// Slopes at the input, except those of exp and sqrt, at the output.
template <class V>
CAPSTAN_ELEMENT V tanh_slope(V x) {
  const V y = tanh(x);
  return fma(-y, y, constant<V>(1));
}
template <class V> CAPSTAN_ELEMENT V sigmoid_slope(V x) { return sigmoid(x) * sigmoid(-x); }
template <class V> CAPSTAN_ELEMENT V log_slope(V x) { return constant<V>(1) / x; }
template <class V> CAPSTAN_ELEMENT V sqrt_slope(V y) { return constant<V>(0.5) / y; }

}  // namespace capstan::kernels
