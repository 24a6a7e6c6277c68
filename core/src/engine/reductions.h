// defines: squared_norm(), all_finite(), accumulate() over flat buffers.
#pragma once
#include <capstan/tensor.h>

namespace capstan {

/// Sum of the squares of a contiguous f32 or f64 tensor, in f64. Fixed blocks in order: the same bits with any number of
/// threads. Not finite when an element is not. 0 on the meta device.
double squared_norm(const Tensor& flat);
bool all_finite(const Tensor& flat);
/// to += from, contiguous f32 or f64 tensors of one size.
void accumulate(const Tensor& to, const Tensor& from);

}  // namespace capstan
