// defines: gpu_of(), cuda_device_count(): the GPU behind a device, for those who move its memory between ranks.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>
#include <kernels/cuda/gpu.h>

namespace capstan {

/// Error(programming) when `device` is not a GPU.
CAPSTAN_API kernels::cuda::Gpu& gpu_of(Device& device);
/// GPUs that this process sees; 0 when it can use none.
CAPSTAN_API int cuda_device_count();

}  // namespace capstan
