// defines: gemm(): matrix products over oneDNN (f32, bf16), own register tiles where it does not keep
// rows apart, and a plain reference (f64).
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

#include <cstdint>

namespace capstan::kernels::cpu {

using kernels::Gemm;
using kernels::Num;

void gemm(Context& context, const Gemm& g, const void* a, const void* b, void* c, const void* bias = nullptr);

}  // namespace capstan::kernels::cpu
