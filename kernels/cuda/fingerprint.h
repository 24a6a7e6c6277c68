// defines: fingerprint() over CUDA. Arguments as in kernels/cpu/fingerprint.h.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

std::uint64_t fingerprint(Context& ctx, Num num, std::int64_t n, const void* data, std::uint64_t first);

}  // namespace capstan::kernels::cuda
