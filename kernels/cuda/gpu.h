// defines: Gpu: the CUDA backend as core sees it, and how core gets one from the library libcapstan_cuda.so, which is
// opened only when a GPU is asked for. Needs no CUDA header.
#pragma once
#include <kernels/backend.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace capstan::kernels::cuda {

/// A point in the work of one of a GPU's streams.
class Mark {
 public:
  virtual ~Mark() = default;
  virtual bool reached() = 0;
  virtual void wait() = 0;  ///< the host
};

/// Copies between the GPU and pinned host memory (Gpu::pin) in a stream of their own, beside the one that kernels run in. Calls
/// return at once; they come from one thread at a time, which need not be that of the kernels.
class CopyStream {
 public:
  virtual ~CopyStream() = default;                                  ///< waits until it is idle
  virtual void after(const Mark& mark) = 0;                         ///< what is asked from now on starts when `mark` is reached
  virtual void download(void* pinned_to, const void* from, std::int64_t bytes) = 0;
  virtual void upload(void* to, const void* pinned_from, std::int64_t bytes) = 0;
  virtual std::shared_ptr<Mark> mark() = 0;                         ///< reached when all that was asked so far is done
};

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
  /// `words`: who has the memory and what lowers the need, for the errors of this library when there is none left.
  virtual void explain_memory(std::function<std::string()> words) = 0;
  /// Whether attention's backward may sum in another order at every run (Attention::any_order); off until asked for.
  virtual void allow_any_order(bool on) = 0;
  /// "NVIDIA H200"
  virtual std::string name() const = 0;
  /// CUDA's number of it in this process; its address on the host's bus, "0000:17:00.0", which no two GPUs of a host share.
  virtual int index() const = 0;
  virtual std::string address() const = 0;

  // Communication. The stream of kernels, beside others:
  virtual std::shared_ptr<Mark> mark() = 0;
  virtual void after(const Mark& mark) = 0;
  virtual std::unique_ptr<CopyStream> make_copy_stream() = 0;
  /// Makes host memory fit for copy streams; whole pages, not pinned yet.
  virtual void pin(void* host, std::int64_t bytes) = 0;
  virtual void unpin(void* host) noexcept = 0;
  /// The kernels' cudaStream_t, for libraries that queue work of their own.
  virtual void* stream() const = 0;
};

/// Raised with each change of Gpu, Backend or types.h: core and the library must have been built together.
inline constexpr int gpu_interface = 8;

/// `capstan_cuda_open`: makes the Gpu `device` (to be deleted by the caller), or returns null with the reason in
/// `message`. Device -1 only looks: null, and the message is empty when a GPU can be used.
using OpenGpu = Gpu* (*)(int interface, int device, char* message, std::size_t message_size);
/// `capstan_cuda_count`: GPUs that this process sees; 0 without a driver.
using CountGpus = int (*)();

}  // namespace capstan::kernels::cuda
