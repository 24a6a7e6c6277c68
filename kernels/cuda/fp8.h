// defines: quantize(): matrices to fp8 over CUDA. Arguments as in kernels/backend.h.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

void quantize(Context& ctx, const Quantize& q);

}  // namespace capstan::kernels::cuda
