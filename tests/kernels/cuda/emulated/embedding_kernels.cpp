// The kernels of embedding.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/embedding.cu>
