// Results that are read later, marks in time, and recorded work (CUDA graphs).
#include <kernels/cuda/queue.h>

#include <kernels/cuda/gemm.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

namespace capstan::kernels::cuda {

namespace {
constexpr std::int64_t slot_bytes = Queue::post_bytes + static_cast<std::int64_t>(sizeof(Context::Fault));
}

/// Where a stream stands until the host lets it go.
struct CudaQueue::Hold {
  explicit Hold(double s) : seconds(s) {}
  double seconds;
  std::mutex mutex;
  std::condition_variable changed;
  bool released = false;
  static void CUDART_CB wait(void* self) {
    auto& hold = *static_cast<Hold*>(self);
    std::unique_lock lock(hold.mutex);
    hold.changed.wait_for(lock, std::chrono::duration<double>(hold.seconds), [&] { return hold.released; });
  }
  void release() {
    const std::lock_guard lock(mutex);
    released = true;
    changed.notify_all();
  }
};

CudaQueue::CudaQueue(Context& ctx) : ctx_(ctx) {}

CudaQueue::~CudaQueue() {
  release();
  cudaSetDevice(ctx_.device());
  cudaStreamSynchronize(ctx_.stream());
  for (const Slot& slot : slots_)
    if (slot.done != nullptr) cudaEventDestroy(slot.done);
  for (const auto& [id, event] : marks_) cudaEventDestroy(event);
  for (const auto& [id, record] : records_) cudaGraphExecDestroy(record.graph);
  if (posted_ != nullptr) cudaFreeHost(posted_);
}

void CudaQueue::measure(std::span<const Piece> gradient, const double* losses, std::int64_t count, GatePart* part) {
  ctx_.bind();
  cuda::measure(ctx_, gradient, losses, count, part);
}

void CudaQueue::decide(const GatePart* parts, std::int64_t ranks, double clip, Gate* gate) {
  ctx_.bind();
  cuda::decide(ctx_, parts, ranks, clip, gate);
}

void CudaQueue::open_gate(Gate* gate) {
  ctx_.bind();
  check(cudaMemsetAsync(gate, 0, sizeof *gate, ctx_.stream()), "opening the gate");
}

std::int64_t CudaQueue::post(const void* from, std::int64_t bytes) {
  ctx_.bind();
  ctx_.refuse_in_record("a result that the host reads");
  if (bytes < 0 || bytes > post_bytes) throw std::invalid_argument("[cuda] a result of " + std::to_string(bytes) + " bytes: expected at most " + std::to_string(post_bytes));
  if (posted_ == nullptr) {
    void* base = nullptr;
    check(cudaHostAlloc(&base, static_cast<std::size_t>(post_slots * slot_bytes), cudaHostAllocDefault), "taking pinned memory");
    posted_ = static_cast<char*>(base);
    slots_.resize(post_slots);
    for (Slot& slot : slots_) check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "making an event");
  }
  const std::int64_t ticket = next_ticket_++, at = ticket % post_slots;
  Slot& slot = slots_[static_cast<std::size_t>(at)];
  if (slot.ticket >= 0) throw std::logic_error("[cuda] " + std::to_string(post_slots) + " results are under way already: collect() one first");
  slot.ticket = ticket;
  char* to = posted_ + at * slot_bytes;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, ctx_.stream()), "copying from the GPU");
  check(cudaMemcpyAsync(to + post_bytes, ctx_.faults(), sizeof(Context::Fault), cudaMemcpyDeviceToHost, ctx_.stream()), "copying from the GPU");
  check(cudaEventRecord(slot.done, ctx_.stream()), "marking a result");
  return ticket;
}

void CudaQueue::collect(std::int64_t ticket, void* host_to, std::int64_t bytes) {
  ctx_.bind();
  const std::int64_t at = ticket % post_slots;
  if (ticket < 0 || slots_.empty() || slots_[static_cast<std::size_t>(at)].ticket != ticket) throw std::logic_error("[cuda] no result has the ticket " + std::to_string(ticket));
  Slot& slot = slots_[static_cast<std::size_t>(at)];
  slot.ticket = -1;
  check(cudaEventSynchronize(slot.done), "waiting for a result");
  const char* from = posted_ + at * slot_bytes;
  std::memcpy(host_to, from, static_cast<std::size_t>(bytes));
  Context::Fault fault{};
  std::memcpy(&fault, from + post_bytes, sizeof fault);
  if (fault.what == 0) return;
  check(cudaStreamSynchronize(ctx_.stream()), "waiting for the GPU");
  ctx_.throw_fault();
}

std::int64_t CudaQueue::mark() {
  ctx_.bind();
  ctx_.refuse_in_record("a mark in time");
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "making an event");
  marks_.emplace(next_mark_, event);
  check(cudaEventRecord(event, ctx_.stream()), "timing");
  return next_mark_++;
}

double CudaQueue::seconds(std::int64_t begin, std::int64_t end) {
  ctx_.bind();
  const auto first = marks_.find(begin), last = marks_.find(end);
  if (first == marks_.end() || last == marks_.end()) throw std::logic_error("[cuda] no such mark in time");
  float ms = 0;
  check(cudaEventSynchronize(last->second), "timing");
  check(cudaEventElapsedTime(&ms, first->second, last->second), "timing");
  cudaEventDestroy(first->second), cudaEventDestroy(last->second);
  marks_.erase(first), marks_.erase(last);
  return 1e-3 * static_cast<double>(ms);
}

void CudaQueue::hold(double seconds) {
  ctx_.bind();
  ctx_.refuse_in_record("a hold");
  holds_.push_back(std::make_unique<Hold>(seconds));
  check(cudaLaunchHostFunc(ctx_.stream(), Hold::wait, holds_.back().get()), "holding the stream");
}

void CudaQueue::release() {
  for (const auto& hold : holds_) hold->release();
}

void CudaQueue::begin_record(std::uint64_t step) {
  ctx_.bind();
  ctx_.begin_record(step);
}

std::int64_t CudaQueue::end_record() {
  ctx_.bind();
  const std::uint64_t step = ctx_.record() != nullptr ? ctx_.record()->step : 0;
  Context::Noted noted;
  cudaGraph_t graph = ctx_.end_record(noted);
  cudaGraphExec_t runnable = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&runnable, graph, 0);
  cudaGraphDestroy(graph);
  if (code != cudaSuccess) ctx_.forget(noted);
  check(code, "making a graph of a record");
  records_.emplace(next_record_, Recorded{runnable, step, std::move(noted)});
  return next_record_++;
}

CudaQueue::Recorded& CudaQueue::recorded(std::int64_t record) {
  const auto it = records_.find(record);
  if (it == records_.end()) throw std::logic_error("[cuda] there is no record " + std::to_string(record));
  return it->second;
}

void CudaQueue::begin_rehearsal(std::int64_t record) {
  ctx_.bind();
  ctx_.begin_rehearsal(recorded(record).noted);
}

void CudaQueue::replay(std::int64_t record, std::uint64_t step) {
  ctx_.bind();
  ctx_.refuse_in_record("a replay");
  const Recorded& r = recorded(record);
  ctx_.set_step_offset(step - r.step);
  ctx_.bring(r.noted);
  check(cudaGraphLaunch(r.graph, ctx_.stream()), "replaying a record");
}

void CudaQueue::forget_record(std::int64_t record) noexcept {
  const auto it = records_.find(record);
  if (it == records_.end()) return;
  cudaSetDevice(ctx_.device());
  cudaStreamSynchronize(ctx_.stream());
  cudaGraphExecDestroy(it->second.graph);
  ctx_.forget(it->second.noted);
  records_.erase(it);
}

std::string CudaQueue::tune_products(const std::string& file) {
  ctx_.bind();
  return ctx_.gemms().tune(ctx_, file);
}

}  // namespace capstan::kernels::cuda
