// The kernels of attention_forward.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/attention_forward.cu>
