// defines: attention over CUDA: cuDNN where it serves, own kernels elsewhere.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

void attention(Context& ctx, const Attention& a);
void attention_backward(Context& ctx, const Attention& a);
void attention_paged(Context& ctx, const PagedAttention& a);

}  // namespace capstan::kernels::cuda
