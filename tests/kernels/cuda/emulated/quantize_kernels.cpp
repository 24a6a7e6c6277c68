// The kernels of quantize.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/quantize.cu>
