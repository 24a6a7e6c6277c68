// defines: StreamMark, wait_for(), make_copy_stream(): marks by events, and copies in a stream of their own.
#pragma once
#include <kernels/cuda/gpu.h>

#include <cuda_runtime.h>

#include <memory>

namespace capstan::kernels::cuda {

/// All that `stream` was asked when this was made.
class StreamMark final : public Mark {
 public:
  StreamMark(int device, cudaStream_t stream);
  ~StreamMark() override;
  StreamMark(const StreamMark&) = delete;
  StreamMark& operator=(const StreamMark&) = delete;
  bool reached() override;
  void wait() override;
  cudaEvent_t event() const { return event_; }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
};

/// What `stream` is asked from now on starts when `mark`, one of this library's, is reached.
void wait_for(cudaStream_t stream, const Mark& mark);

std::unique_ptr<CopyStream> make_copy_stream(int device);

}  // namespace capstan::kernels::cuda
