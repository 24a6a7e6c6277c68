// The kernels of softmax.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/softmax.cu>
