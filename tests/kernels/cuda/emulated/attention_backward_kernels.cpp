// The kernels of attention_backward.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/attention_backward.cu>
