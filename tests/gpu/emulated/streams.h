// defines: enqueue(): work in a stream of the emulated GPU.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>

namespace capstan::emulated {

/// At once in the stream of kernels, in order and later in one of communication.
__attribute__((visibility("default"))) void enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace capstan::emulated
