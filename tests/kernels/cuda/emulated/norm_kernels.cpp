// The kernels of norm.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/norm.cu>
