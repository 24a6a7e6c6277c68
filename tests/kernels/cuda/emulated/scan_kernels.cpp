// The kernels of scan.cu on an emulated GPU.
#include <emulated.h>

#include <kernels/cuda/scan.cu>
