// Collectives among GPUs by NCCL.
#include "comm/nccl/nccl_world.h"

#include <capstan/error.h>
#include <fmt/format.h>
#include <nccl.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace capstan::comm {
namespace {

using Clock = std::chrono::steady_clock;

void check(cudaError_t code, const std::string& where) {
  if (code != cudaSuccess) fail(Fault::runtime, where, std::string("CUDA: ") + cudaGetErrorString(code));
}

ncclDataType_t type_of(DType dtype, const std::string& where) {
  switch (dtype) {
    case DType::f64: return ncclFloat64;
    case DType::f32: return ncclFloat32;
    case DType::f16: return ncclFloat16;
    case DType::bf16: return ncclBfloat16;
    case DType::i32: return ncclInt32;
    case DType::i64: return ncclInt64;
    case DType::u8: return ncclUint8;
    default: fail(Fault::programming, where, "NCCL does not know " + std::string(name_of(dtype)));
  }
}

ncclRedOp_t operation_of(Reduction op) {
  return op == Reduction::sum ? ncclSum : op == Reduction::max ? ncclMax : ncclMin;
}

const std::byte* at(const void* base, std::int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(base) + elements * size_of(dtype);
}
std::byte* at(void* base, std::int64_t elements, DType dtype) {
  return static_cast<std::byte*>(base) + elements * size_of(dtype);
}

/// What a collective leaves on the GPU: when it started and ended.
struct Flight {
  std::string collective;
  double bytes = 0;
  cudaEvent_t start = nullptr, end = nullptr;
  Clock::time_point since = Clock::now();
  bool failed = false;
  ~Flight() {
    if (start) cudaEventDestroy(start);
    if (end) cudaEventDestroy(end);
  }
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<World> world, std::shared_ptr<Communicator> control, int device, cudaStream_t compute)
      : Communicator(control->name(), control->ranks(), control->rank()), world_(std::move(world)),
        control_(std::move(control)), device_(device), compute_(compute) {
    bind();
    ncclUniqueId id;
    std::memset(&id, 0, sizeof id);
    if (rank() == 0) check(ncclGetUniqueId(&id), "make");
    control_->broadcast(&id, sizeof id, DType::u8, 0).wait();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), where("make"));
    // Not blocking: a rank that does not come must not hold this one in NCCL for ever.
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.commName = this->name().c_str();
    const ncclResult_t code = ncclCommInitRankConfig(&comm_, size(), id, rank(), &config);
    if (code != ncclInProgress) check(code, "make");
    settle("make");
    thread_ = std::thread([this] { watch(); });
  }

  ~NcclCommunicator() override {
    {
      const std::scoped_lock lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    thread_.join();
    bind();
    if (!broken_) ncclCommFinalize(comm_);
    if (!broken_ && wait_for_state()) ncclCommDestroy(comm_);
    else ncclCommAbort(comm_);
    cudaStreamDestroy(stream_);
  }

  Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) override {
    const double bytes = 2.0 * (size() - 1) / size() * static_cast<double>(count * size_of(dtype));
    return launch("all_reduce", count, bytes, [&] {
      return ncclAllReduce(data, data, z(count), type("all_reduce", dtype), operation_of(op), comm_, stream_);
    });
  }

  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) override {
    return launch("reduce_scatter", count, others(count, dtype), [&] {
      return ncclReduceScatter(in, out, z(count), type("reduce_scatter", dtype), operation_of(op), comm_, stream_);
    });
  }

  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    return launch("all_gather", count, others(count, dtype), [&] {
      return ncclAllGather(in, out, z(count), type("all_gather", dtype), comm_, stream_);
    });
  }

  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    require(counts, "all_gather_v");
    const auto mine = counts[static_cast<std::size_t>(rank())];
    return launch("all_gather_v", 0, others(mine, dtype), [&] {
      return grouped([&] {
        std::int64_t place = 0;
        for (int r = 0; r < size(); ++r) {
          const std::int64_t n = counts[static_cast<std::size_t>(r)];
          std::byte* block = at(out, place, dtype);
          if (n > 0)
            call(ncclBroadcast(r == rank() ? in : block, block, z(n), type("all_gather_v", dtype), r, comm_, stream_));
          place += n;
        }
      });
    });
  }

  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override {
    const std::vector<std::int64_t> counts(static_cast<std::size_t>(size()), count);
    return exchange("all_to_all", in, counts, out, counts, dtype);
  }

  Handle all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                      std::span<const std::int64_t> receive_counts, DType dtype) override {
    return exchange("all_to_all_v", in, send_counts, out, receive_counts, dtype);
  }

  Handle broadcast(void* data, std::int64_t count, DType dtype, int root) override {
    if (root < 0 || root >= size()) wrong("broadcast", fmt::format("root {} of {} ranks", root, size()));
    return launch("broadcast", count, rank() == root ? static_cast<double>(count * size_of(dtype)) : 0, [&] {
      return ncclBroadcast(data, data, z(count), type("broadcast", dtype), root, comm_, stream_);
    });
  }

  Handle send(const void* data, std::int64_t count, DType dtype, int to) override {
    peer("send", to);
    return launch("send", count, static_cast<double>(count * size_of(dtype)), [&] {
      return ncclSend(data, z(count), type("send", dtype), to, comm_, stream_);
    });
  }

  Handle receive(void* data, std::int64_t count, DType dtype, int from) override {
    peer("receive", from);
    return launch("receive", count, 0, [&] {
      return ncclRecv(data, z(count), type("receive", dtype), from, comm_, stream_);
    });
  }

  /// Of the hosts, once their GPUs have ended what was called before.
  void barrier() override {
    bind();
    check(cudaStreamSynchronize(stream_), where("barrier"));
    throw_if_broken();
    control_->barrier();
    record("barrier", 1, 0, 0, 0);
  }

 private:
  /// Makes the compute stream wait for the collective.
  struct Wait final : Handle::Operation {
    Wait(NcclCommunicator& c, std::shared_ptr<Flight> f) : comm(c), flight(std::move(f)) {}
    void wait() override {
      comm.throw_if_broken();
      comm.bind();
      comm.check(cudaStreamWaitEvent(comm.compute_, flight->end, 0), comm.where(flight->collective));
    }
    bool done() override { return cudaEventQuery(flight->end) != cudaErrorNotReady; }
    NcclCommunicator& comm;
    std::shared_ptr<Flight> flight;
  };

  static std::size_t z(std::int64_t n) { return static_cast<std::size_t>(n); }
  std::string where(const std::string& collective) const {
    return fmt::format("{} of communicator '{}'", collective, name());
  }
  [[noreturn]] void wrong(const std::string& collective, const std::string& what) const {
    fail(Fault::programming, where(collective), what);
  }
  ncclDataType_t type(const std::string& collective, DType dtype) const { return type_of(dtype, where(collective)); }
  double others(std::int64_t count, DType dtype) const {
    return (size() - 1.0) * static_cast<double>(count * size_of(dtype));
  }
  void require(std::span<const std::int64_t> counts, const std::string& collective) const {
    if (static_cast<int>(counts.size()) != size())
      wrong(collective, fmt::format("{} counts for {} ranks", counts.size(), size()));
    for (const std::int64_t n : counts)
      if (n < 0) wrong(collective, fmt::format("negative count {}", n));
  }
  void peer(const std::string& collective, int other) const {
    if (other < 0 || other >= size() || other == rank())
      wrong(collective, fmt::format("peer {} of {} ranks, this is {}", other, size(), rank()));
  }
  void bind() const { check(cudaSetDevice(device_), where("use")); }
  void check(cudaError_t code, const std::string& place) const { comm::check(code, place); }
  void check(ncclResult_t code, const std::string& collective) const {
    if (code == ncclSuccess || code == ncclInProgress) return;
    const char* last = comm_ ? ncclGetLastError(comm_) : "";
    fail(Fault::runtime, where(collective), fmt::format("NCCL: {} {}", ncclGetErrorString(code), last ? last : ""));
  }

  /// Waits until the communicator has done what it was asked for; false when it failed or took longer than the timeout.
  bool wait_for_state() const {
    const auto deadline = Clock::now() + std::chrono::duration<double>(world_->timeout());
    ncclResult_t state = ncclInProgress;
    while (ncclCommGetAsyncError(comm_, &state) == ncclSuccess && state == ncclInProgress) {
      if (Clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return state == ncclSuccess;
  }
  void settle(const std::string& collective) {
    if (wait_for_state()) return;
    const std::string text = fmt::format("NCCL did not start {} within {:.3g} s, or failed: {}", collective,
                                         world_->timeout(), ncclGetLastError(comm_));
    ncclCommAbort(comm_);
    world_->fail_job(text);
    fail(Fault::runtime, where(collective), text);
  }

  void call(ncclResult_t code) {
    if (group_code_ == ncclSuccess && code != ncclInProgress) group_code_ = code;
  }
  /// Calls within `body` start together; their first error, or the group's.
  template <class Body>
  ncclResult_t grouped(Body&& body) {
    group_code_ = ncclGroupStart();
    body();
    const ncclResult_t end = ncclGroupEnd();
    return group_code_ != ncclSuccess ? group_code_ : end;
  }

  template <class Body>
  Handle launch(const char* collective, std::int64_t count, double bytes, Body&& body) {
    if (count < 0) wrong(collective, fmt::format("negative count {}", count));
    throw_if_broken();
    bind();
    auto flight = std::make_shared<Flight>();
    flight->collective = collective;
    flight->bytes = bytes;
    const std::string place = where(collective);
    check(cudaEventCreate(&flight->start), place);
    check(cudaEventCreate(&flight->end), place);
    // After what makes the data.
    check(cudaEventRecord(flight->start, compute_), place);
    check(cudaStreamWaitEvent(stream_, flight->start, 0), place);
    check(cudaEventRecord(flight->start, stream_), place);
    const ncclResult_t code = body();
    check(code, collective);
    if (code == ncclInProgress) settle(collective);
    check(cudaEventRecord(flight->end, stream_), place);
    {
      const std::scoped_lock lock(mutex_);
      flights_.push_back(flight);
      changed_.notify_all();
    }
    return Handle(std::make_shared<Wait>(*this, flight));
  }

  Handle exchange(const char* collective, const void* in, std::span<const std::int64_t> send_counts, void* out,
                  std::span<const std::int64_t> receive_counts, DType dtype) {
    require(send_counts, collective);
    require(receive_counts, collective);
    const auto me = static_cast<std::size_t>(rank());
    const std::int64_t all = std::accumulate(send_counts.begin(), send_counts.end(), std::int64_t{0});
    return launch(collective, 0, static_cast<double>((all - send_counts[me]) * size_of(dtype)), [&] {
      return grouped([&] {
        std::int64_t from = 0, to = 0;
        for (int r = 0; r < size(); ++r) {
          const auto i = static_cast<std::size_t>(r);
          if (send_counts[i] > 0)
            call(ncclSend(at(in, from, dtype), z(send_counts[i]), type(collective, dtype), r, comm_, stream_));
          if (receive_counts[i] > 0)
            call(ncclRecv(at(out, to, dtype), z(receive_counts[i]), type(collective, dtype), r, comm_, stream_));
          from += send_counts[i];
          to += receive_counts[i];
        }
      });
    });
  }

  void throw_if_broken() const {
    const std::scoped_lock lock(mutex_);
    if (broken_) fail(Fault::runtime, where("use"), failure_);
  }

  /// Counts what has ended, and ends the job when the oldest collective takes longer than the timeout or NCCL reports an
  /// error.
  void watch() {
    cudaSetDevice(device_);
    std::unique_lock lock(mutex_);
    while (!stop_ || (!flights_.empty() && !broken_)) {
      if (flights_.empty() || broken_) {
        changed_.wait(lock);
        continue;
      }
      const auto flight = flights_.front();
      lock.unlock();
      const cudaError_t state = cudaEventQuery(flight->end);
      ncclResult_t async = ncclSuccess;
      ncclCommGetAsyncError(comm_, &async);
      std::string problem;
      if (state == cudaSuccess) {
        float milliseconds = 0;
        cudaEventElapsedTime(&milliseconds, flight->start, flight->end);
        record(flight->collective, 1, flight->bytes, 1e-3 * milliseconds, 0);
      } else if (state != cudaErrorNotReady) {
        problem = std::string("CUDA: ") + cudaGetErrorString(state);
      } else if (async != ncclSuccess && async != ncclInProgress) {
        problem = fmt::format("NCCL: {} {}", ncclGetErrorString(async), ncclGetLastError(comm_));
      } else if (started(*flight) &&
                 std::chrono::duration<double>(Clock::now() - flight->since).count() > world_->timeout()) {
        problem = fmt::format("it has not ended within {:.3g} s: a rank of the group did not come, or a link is down",
                              world_->timeout());
      }
      if (!problem.empty()) problem = fmt::format("{}: {}", where(flight->collective), problem);
      if (!problem.empty()) world_->fail_job(problem);
      lock.lock();
      if (!problem.empty()) broken_ = true, failure_ = problem;
      else if (state == cudaSuccess) flights_.pop_front();
      else changed_.wait_for(lock, std::chrono::milliseconds(1));
    }
  }

  /// Time counts from when the GPU comes to the collective: what is queued before it may be long.
  static bool started(Flight& flight) {
    if (cudaEventQuery(flight.start) == cudaSuccess) return true;
    flight.since = Clock::now();
    return false;
  }

  std::shared_ptr<World> world_;
  std::shared_ptr<Communicator> control_;
  int device_;
  cudaStream_t compute_, stream_ = nullptr;
  ncclComm_t comm_ = nullptr;
  ncclResult_t group_code_ = ncclSuccess;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Flight>> flights_;
  bool stop_ = false, broken_ = false;
  std::string failure_;
  std::thread thread_;
};

class NcclWorld final : public World {
 public:
  NcclWorld(std::shared_ptr<World> control, int device, cudaStream_t compute)
      : control_(std::move(control)), device_(device), compute_(compute) {}
  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }
  int local_rank() const override { return control_->local_rank(); }
  int local_size() const override { return control_->local_size(); }
  std::string_view backend() const override { return "nccl"; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    auto control = control_->make(std::move(name), std::move(ranks));
    return std::make_shared<NcclCommunicator>(control_, std::move(control), device_, compute_);
  }
  void at(std::int64_t step, std::string_view doing) override { control_->at(step, doing); }
  bool fail_job(const std::string& message) noexcept override { return control_->fail_job(message); }
  void end_failed(int exit_code) override { control_->end_failed(exit_code); }
  double timeout() const override { return control_->timeout(); }

 private:
  std::shared_ptr<World> control_;
  int device_;
  cudaStream_t compute_;
};

}  // namespace
}  // namespace capstan::comm

namespace capstan {

std::shared_ptr<World> make_nccl_world(std::shared_ptr<World> control, int device, cudaStream_t compute) {
  if (!control) fail(Fault::programming, "NCCL", "a world of GPUs needs one of their hosts");
  comm::check(cudaSetDevice(device), fmt::format("GPU {}", device));
  return std::make_shared<comm::NcclWorld>(std::move(control), device, compute);
}

}  // namespace capstan
