// defines: Gpu: the CUDA backend as core sees it, and how core gets one from the library libcapstan_cuda.so, which is
// opened only when a GPU is asked for. Needs no CUDA header.
#pragma once
#include <kernels/backend.h>

#include <cstddef>
#include <string>

namespace capstan::kernels::cuda {

class Gpu : public Backend {
 public:
  /// Memory of at least `bytes`, 256-byte aligned, in the order of the stream; null when there is none.
  virtual void* allocate(std::int64_t bytes) = 0;
  virtual void release(void* data) noexcept = 0;
  /// Bytes taken from the driver; bytes that the GPU has.
  virtual std::int64_t reserved() const = 0;
  virtual std::int64_t capacity() const = 0;
  /// Bytes of the GPU that nobody uses, other processes included.
  virtual std::int64_t available() const = 0;
  /// "NVIDIA H200"
  virtual std::string name() const = 0;
};

/// Raised with each change of Gpu, Backend or types.h: core and the library must have been built together.
inline constexpr int gpu_interface = 2;

/// `capstan_cuda_open`: makes the Gpu `device` (to be deleted by the caller), or returns null with the reason in
/// `message`. Device -1 only looks: null, and the message is empty when a GPU can be used.
using OpenGpu = Gpu* (*)(int interface, int device, char* message, std::size_t message_size);

}  // namespace capstan::kernels::cuda
