// defines: gelu, silu, swiglu and their backwards over flat arrays and rows.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// 0.5 x (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))), computed as x sigmoid(2 sqrt(2/pi)(...)): the same
/// function without the cancellation at negative x.
template <class T>
CAPSTAN_INLINE Vec<T> gelu_of(Vec<T> x) {
  using V = Vec<T>;
  const V cubic = fma(x * x, V(T(0.044715)), V(T(1)));
  return x * sigmoid(V(T(1.5957691216057308)) * x * cubic);
}
template <class T>
CAPSTAN_INLINE Vec<T> gelu_slope(Vec<T> x) {
  using V = Vec<T>;
  const V one(T(1)), square = min(x * x, V(T(1e30)));  // the bound keeps 0 * inf out where the slope is 0 or 1
  const V s = sigmoid(V(T(1.5957691216057308)) * x * fma(square, V(T(0.044715)), one));
  const V inner = V(T(1.5957691216057308)) * fma(square, V(T(3 * 0.044715)), one);
  return fma(x * s * (one - s), inner, s);
}
template <class T> CAPSTAN_INLINE Vec<T> silu_of(Vec<T> x) { return x * sigmoid(x); }
template <class T>
CAPSTAN_INLINE Vec<T> silu_slope(Vec<T> x) {
  const Vec<T> one(T(1)), s = sigmoid(x);
  return s * fma(x, one - s, one);
}

// T: double, float, bf16; n elements.
template <class T> void gelu(Context& ctx, std::int64_t n, const T* x, T* y);
template <class T> void gelu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx);
template <class T> void silu(Context& ctx, std::int64_t n, const T* x, T* y);
template <class T> void silu_backward(Context& ctx, std::int64_t n, const T* x, const T* g, T* dx);

/// gate_up [rows, 2 width] -> y [rows, width].
template <class T> void swiglu(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, T* y);
/// g [rows, width] -> dx [rows, 2 width].
template <class T>
void swiglu_backward(Context& ctx, std::int64_t rows, std::int64_t width, const T* gate_up, const T* g, T* dx);

}  // namespace capstan::kernels::cpu
