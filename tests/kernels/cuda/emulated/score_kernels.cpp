// The kernels of score.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/score.cu>
