// defines: the updates that optimizers are made of, fused, on whatever device the tensors live: AdamW, SGD, momentum,
// a x + b y, and normalization. Values and gradients are f32 or f64; states f32, or f64 with f64 values. No gradients.
#pragma once
#include <capstan/tensor.h>

namespace capstan::update {

/// Numbers of one step, the same for every element:
///   g = grad * grad_scale,  m' = m + beta1_rest (g - m),  v' = beta2 v + beta2_rest g^2
///   value' = keep value - rate m' / (sqrt(v') v_scale + epsilon)
struct AdamW { double grad_scale = 1, keep = 1, rate = 0, beta1_rest = 0, beta2 = 0, beta2_rest = 0, v_scale = 1, epsilon = 0; };
/// All contiguous and of one shape; grad of value's element type, m and v of one.
CAPSTAN_API void adamw(const AdamW& step, const Tensor& value, const Tensor& grad, const Tensor& m, const Tensor& v);

///   g = grad * grad_scale + decay value,  b' = momentum b + g,  value' = value - lr (nesterov ? g + momentum b' : b')
struct Sgd { double grad_scale = 1, decay = 0, momentum = 0, lr = 0; bool nesterov = false; };
/// All contiguous and of one shape; an undefined buffer means none: value' = value - lr g.
CAPSTAN_API void sgd(const Sgd& step, const Tensor& value, const Tensor& grad, const Tensor& buffer);

///   g = grad * grad_scale,  buffer' = mu buffer + (1 - mu) g;  returns nesterov ? (1 - mu) g + mu buffer' : buffer'
/// Matrices [R, C] whose rows may be apart (alike in both); the result is contiguous.
CAPSTAN_API Tensor momentum(const Tensor& grad, const Tensor& buffer, double grad_scale, double mu, bool nesterov);

/// out = a x + b y, matrices [R, C] with unit column stride; out may be x or y; an undefined y counts as 0.
CAPSTAN_API void axpby(double a, const Tensor& x, double b, const Tensor& y, const Tensor& out);

/// x *= 1 / max(|x|, least), |x| the root of the sum of squares in f64; contiguous.
CAPSTAN_API void normalize(const Tensor& x, double least);

}  // namespace capstan::update
