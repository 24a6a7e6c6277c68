// Stream capture: what a stream is asked for while it records is kept and runs at each launch of the graph, with the memory of that
// time. What a graph took from the host while it was made stays in it, and memory that was given back is spoiled: a stale value or
// address gives other results.
#include "gpu/emulated/graphs.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan::emulated {

namespace {

using Work = std::vector<std::function<void()>>;
thread_local std::unique_ptr<Capture> record;
std::atomic<unsigned long long> next_id{0};
thread_local long waits = 0;
double product_ms = 0;
int products = 0;

}  // namespace

bool Capture::joined() const {
  const Seen& seen = streams.at(nullptr);
  return std::all_of(streams.begin(), streams.end(), [&](const auto& s) {
    const auto own = s.second.find(s.first), known = seen.find(s.first);
    return own == s.second.end() || (known != seen.end() && known->second >= own->second);
  });
}

Capture* capture() { return record.get(); }

bool note(std::function<void()> work) {
  if (!record) return false;
  record->add(nullptr, std::move(work));
  return true;
}

cudaError_t waited() {
  ++waits;
  if (!record) return cudaSuccess;
  record->broken = true;
  return cudaErrorStreamCaptureUnsupported;
}

void product_ran(int algorithm) {
  const char* text = std::getenv("EMULATED_GPU_TIMES");
  double ms = 1.0 / (algorithm + 1);
  if (text != nullptr)
    for (int i = 0; text != nullptr && i <= algorithm; ++i) {
      ms = std::atof(text);
      text = std::strchr(text, ',');
      if (text != nullptr) ++text;
    }
  product_ms += ms, ++products;
}

float elapsed() {
  const double ms = products == 0 ? 1 : product_ms;
  product_ms = 0, products = 0;
  return static_cast<float>(ms);
}

void released(void* data, std::size_t bytes) {
  // Large pieces go back to the system instead: each page that was touched makes every opening of device memory slower.
  constexpr std::size_t large = std::size_t{4} << 20, page = 4096;
  touch_device_memory([=] {
    if (bytes < large) std::memset(data, 0xff, bytes);
    else madvise(reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page), (bytes - page) / page * page, MADV_DONTNEED);
  });
}

}  // namespace capstan::emulated

using Work = std::vector<std::function<void()>>;

extern "C" {

/// How often the calling thread has waited for the GPU.
__attribute__((visibility("default"))) long emulated_gpu_waits() { return capstan::emulated::waits; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  using namespace capstan::emulated;
  if (record) return cudaErrorIllegalState;
  record = std::make_unique<Capture>();
  record->id = ++next_id;
  record->streams[nullptr];
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!capstan::emulated::record) return cudaErrorIllegalState;
  const auto made = std::move(capstan::emulated::record);
  if (made->broken) return cudaErrorStreamCaptureInvalidated;
  if (!made->joined()) return cudaErrorStreamCaptureUnjoined;
  *graph = reinterpret_cast<cudaGraph_t>(new Work(std::move(made->work)));
  return cudaSuccess;
}
/// Of the stream of kernels alone. NCCL's part asks too.
__attribute__((visibility("default"))) cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  const auto* c = capstan::emulated::capture();
  *status = c == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  if (c != nullptr && id != nullptr) *id = c->id;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* runnable, cudaGraph_t graph, unsigned long long) {
  *runnable = reinterpret_cast<cudaGraphExec_t>(new Work(*reinterpret_cast<Work*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Work*>(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete reinterpret_cast<Work*>(graph), cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  if (capstan::emulated::record) return cudaErrorStreamCaptureUnsupported;
  for (const auto& work : *reinterpret_cast<Work*>(graph)) work();
  return cudaSuccess;
}
}
