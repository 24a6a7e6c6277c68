// defines: enqueue(), enqueue_collective(): work in a stream of the emulated GPU.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>

namespace capstan::emulated {

/// At once in the stream of kernels, in order and later in one of communication.
__attribute__((visibility("default"))) void enqueue(cudaStream_t stream, std::function<void()> work);
/// The same for a collective. False when it is part of a record and not behind the record's collective before it: a GPU may start
/// the two in any order, which may be another one on another rank.
__attribute__((visibility("default"))) bool enqueue_collective(cudaStream_t stream, std::function<void()> work);

}  // namespace capstan::emulated
