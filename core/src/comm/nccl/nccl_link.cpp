#include "comm/nccl/nccl_link.h"

#include "base/cuda_device.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace capstan::comm {

void check_cuda(cudaError_t code, const std::string& where) {
  if (code != cudaSuccess) fail(Fault::runtime, where, std::string("CUDA: ") + cudaGetErrorString(code));
}

void Job::bind(const std::string& where) const { check_cuda(cudaSetDevice(gpu), where); }

Link::Link(const Job& job, const std::string& name, const ncclUniqueId& id, int size, int rank) : Link(job, name) {
  const std::string where = fmt::format("communicator '{}'", name_);
  job_.bind(where);
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), where);
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), where);
  // Not blocking: a rank that does not come must not hold this one in NCCL for ever.
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.commName = name_.c_str();
  // NCCL does not say what a communicator takes: it is what the GPU, this rank's own, has less afterwards, but for what the
  // pool took meanwhile. What NCCL takes at a first collective is not seen.
  const auto left = [&] {
    std::size_t free = 0, all = 0;
    check_cuda(cudaMemGetInfo(&free, &all), where);
    return static_cast<std::int64_t>(free) + job_.device->bytes_reserved();
  };
  const std::int64_t before = left();
  const ncclResult_t code = ncclCommInitRankConfig(&comm_, size, id, rank, &config);
  if (code != ncclInProgress) check(code, where);
  settle(where);
  bytes_ = std::max<std::int64_t>(0, before - left());
  count_communication(*job_.device, bytes_);
}

Link::~Link() {
  cudaSetDevice(job_.gpu);
  if (comm_ != nullptr) {
    if (!stuck_) {
      deregister();
      const ncclResult_t code = ncclCommFinalize(comm_);
      stuck_ = (code != ncclSuccess && code != ncclInProgress) || !wait_for_state();
    }
    // Both return when they are done, also for a communicator that does not block (NCCL: a group that destroys blocks).
    if (stuck_)
      ncclCommAbort(comm_);
    else
      ncclCommDestroy(comm_);
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
  if (bytes_ != 0) count_communication(*job_.device, -bytes_);
}

/// Windows first: each holds a registration of its own.
void Link::deregister() noexcept {
  for (const Adopted& a : adopted_) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
    if (a.window != nullptr) ncclCommWindowDeregister(comm_, a.window);
#endif
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 19, 0)
    if (a.handle != nullptr) ncclCommDeregister(comm_, a.handle);
#endif
  }
}

void Link::check(ncclResult_t code, const std::string& where) const {
  if (code == ncclSuccess || code == ncclInProgress) return;
  const char* last = ncclGetLastError(comm_);
  fail(Fault::runtime, where, fmt::format("NCCL: {} {}", ncclGetErrorString(code), last ? last : ""));
}

void Link::abort() {
  ncclComm_t comm = nullptr;
  {
    const std::scoped_lock lock(mutex_);
    std::swap(comm, comm_);
  }
  // Without the lock: NCCL waits for graphs that hold the communicator, and who drops them may ask for this link first.
  if (comm != nullptr) ncclCommAbort(comm);
}

std::unique_lock<std::mutex> Link::use(const std::string& where) const {
  std::unique_lock lock(mutex_);
  if (comm_ == nullptr) fail(Fault::runtime, where, fmt::format("communicator '{}' was ended because a collective failed", name_));
  return lock;
}

/// False when NCCL failed or took longer than the timeout. What it was asked for is mostly under way at once: sleeping would cost
/// more than it takes.
bool Link::wait_for_state() const {
  constexpr int looks = 1000;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(job_.control->timeout());
  ncclResult_t state = ncclInProgress;
  for (int look = 0; ncclCommGetAsyncError(comm_, &state) == ncclSuccess && state == ncclInProgress; ++look) {
    if (look < looks) {
      std::this_thread::yield();
      continue;
    }
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return state == ncclSuccess;
}

void Link::settle(const std::string& where) {
  if (wait_for_state()) return;
  stuck_ = true;
  const char* last = ncclGetLastError(comm_);
  const std::string text = fmt::format("NCCL did not get under way within {:.3g} s, or failed: {}", job_.control->timeout(),
                                       last ? last : "it does not say why");
  job_.control->fail_job(where + ": " + text);
  fail(Fault::runtime, where, text);
}

std::string Link::fault() const {
  const std::scoped_lock lock(mutex_);
  if (comm_ == nullptr) return "";
  ncclResult_t state = ncclSuccess;
  ncclCommGetAsyncError(comm_, &state);
  if (state == ncclSuccess || state == ncclInProgress) return "";
  const char* last = ncclGetLastError(comm_);
  return fmt::format("NCCL: {} {}", ncclGetErrorString(state), last ? last : "");
}

void Link::adopt(std::shared_ptr<void> memory, std::size_t bytes) {
  const std::string where = fmt::format("registering memory with communicator '{}'", name_);
  job_.bind(where);
  const auto in_use = use(where);
  Adopted& a = adopted_.emplace_back();
  a.memory = std::move(memory);
  // Both may return success while a thread of NCCL still registers (2.28's window does): the state says when it has ended.
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
  check(ncclCommWindowRegister(comm_, a.memory.get(), bytes, &a.window, NCCL_WIN_COLL_SYMMETRIC), where);
  settle(where);
  if (a.window != nullptr) return;  // null where NCCL has no use for one
#endif
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 19, 0)
  check(ncclCommRegister(comm_, a.memory.get(), bytes, &a.handle), where);
  settle(where);
#endif
}

std::shared_ptr<void> nccl_memory(const Job& job, std::size_t bytes) {
  job.bind("memory for collectives");
  void* data = nullptr;
  if (ncclMemAlloc(&data, bytes) != ncclSuccess || data == nullptr) {
    cudaGetLastError();  // out of memory is an answer, not a fault
    return nullptr;
  }
  count_communication(*job.device, static_cast<std::int64_t>(bytes));
  return {data, [device = job.device, gpu = job.gpu, bytes](void* p) {
            cudaSetDevice(gpu);
            cudaDeviceSynchronize();  // unlike memory of the pool, it does not come back in the stream's order
            ncclMemFree(p);
            count_communication(*device, -static_cast<std::int64_t>(bytes));
          }};
}

}  // namespace capstan::comm
