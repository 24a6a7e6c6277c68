// Copies beside the kernels, and the events that order the two.
#include <kernels/cuda/context.h>
#include <kernels/cuda/copy_stream.h>

namespace capstan::kernels::cuda {

StreamMark::StreamMark(int device, cudaStream_t stream) : device_(device) {
  check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event");
  check(cudaEventRecord(event_, stream), "marking a stream");
}

StreamMark::~StreamMark() {
  cudaSetDevice(device_);
  cudaEventDestroy(event_);
}

bool StreamMark::reached() {
  const cudaError_t code = cudaEventQuery(event_);
  if (code == cudaErrorNotReady) return false;
  check(code, "asking how far a stream is");
  return true;
}

void StreamMark::wait() { check(cudaEventSynchronize(event_), "waiting for a stream"); }

void wait_for(cudaStream_t stream, const Mark& mark) {
  check(cudaStreamWaitEvent(stream, static_cast<const StreamMark&>(mark).event(), 0), "ordering streams");
}

namespace {

class Copies final : public CopyStream {
 public:
  explicit Copies(int device) : device_(device) {
    check(cudaSetDevice(device_), "choosing the GPU");
    int least = 0, greatest = 0;  // ranks wait for each other's copies: they go ahead of kernels that are queued
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "reading the GPU's priorities");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "making a stream");
  }
  ~Copies() override {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  void after(const Mark& mark) override {
    bind();
    wait_for(stream_, mark);
  }
  void download(void* pinned_to, const void* from, std::int64_t bytes) override {
    copy(pinned_to, from, bytes, cudaMemcpyDeviceToHost, "copying from the GPU");
  }
  void upload(void* to, const void* pinned_from, std::int64_t bytes) override {
    copy(to, pinned_from, bytes, cudaMemcpyHostToDevice, "copying to the GPU");
  }
  std::shared_ptr<Mark> mark() override {
    bind();
    return std::make_shared<StreamMark>(device_, stream_);
  }

 private:
  void bind() const { check(cudaSetDevice(device_), "choosing the GPU"); }
  void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind, const char* doing) {
    if (bytes == 0) return;
    bind();
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream_), doing);
  }
  int device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<CopyStream> make_copy_stream(int device) { return std::make_unique<Copies>(device); }

}  // namespace capstan::kernels::cuda
