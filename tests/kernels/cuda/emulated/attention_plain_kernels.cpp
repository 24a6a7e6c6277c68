// The kernels of attention_plain.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/attention_plain.cu>
