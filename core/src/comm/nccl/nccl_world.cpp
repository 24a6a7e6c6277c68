// Collectives among GPUs by NCCL.
#include "comm/nccl/nccl_world.h"

#include "base/cuda_device.h"
#include "comm/lane.h"
#include "comm/nccl/nccl_link.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
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

ncclDataType_t type_of(DType dtype, const std::string& where) {
  switch (dtype) {
    case DType::f64:
      return ncclFloat64;
    case DType::f32:
      return ncclFloat32;
    case DType::f16:
      return ncclFloat16;
    case DType::bf16:
      return ncclBfloat16;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    case DType::u8:
      return ncclUint8;
    default:
      fail(Fault::programming, where, "NCCL does not know " + std::string(name_of(dtype)));
  }
}

ncclRedOp_t operation_of(Reduction op) { return op == Reduction::sum ? ncclSum : op == Reduction::max ? ncclMax : ncclMin; }

const std::byte* at(const void* base, std::int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(base) + elements * size_of(dtype);
}
std::byte* at(void* base, std::int64_t elements, DType dtype) {
  return static_cast<std::byte*>(base) + elements * size_of(dtype);
}

}  // namespace

/// What a collective leaves on the GPU: when its data was there, when it started and ended.
struct Flight {
  std::string collective;
  double bytes = 0;
  cudaEvent_t ready = nullptr, start = nullptr, end = nullptr;
  Clock::time_point since = Clock::now();
  const Link* link = nullptr;  // null: a replayed record, with collectives of several links
  bool recorded = false;       // its events are places in a record, not in time
  std::atomic<bool> asked{true};  // `end` is in its stream
  std::shared_ptr<Task> task;  // of sends and receives: what asks NCCL for it
  ~Flight() {
    for (cudaEvent_t e : {ready, start, end})
      if (e) cudaEventDestroy(e);
  }
};

namespace {

class NcclCommunicator final : public Communicator, public std::enable_shared_from_this<NcclCommunicator> {
 public:
  NcclCommunicator(std::shared_ptr<const Job> job, std::shared_ptr<Communicator> control)
      : Communicator(control->name(), control->ranks(), control->rank()),
        job_(std::move(job)),
        control_(std::move(control)) {
    job_->bind(where("make"));
    ncclUniqueId id;
    std::memset(&id, 0, sizeof id);
    if (rank() == 0 && ncclGetUniqueId(&id) != ncclSuccess) fail(Fault::runtime, where("make"), "NCCL gives no id");
    control_->broadcast(&id, sizeof id, DType::u8, 0).wait();
    main_ = std::make_unique<Link>(*job_, this->name(), id, size(), rank());
    thread_ = std::thread([this] { watch(); });
  }

  ~NcclCommunicator() override {
    for (auto& [key, peer] : peers_) peer->lane->close();
    {
      const std::scoped_lock lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  /// `flight`: of a record in this rank's stream of kernels, with collectives of this communicator or others.
  void watch_replay(std::shared_ptr<Flight> flight) {
    const std::scoped_lock lock(mutex_);
    flights_.push_back(std::move(flight));
    changed_.notify_all();
  }

  void adopt(std::shared_ptr<void> memory, std::size_t bytes) override { main_->adopt(std::move(memory), bytes); }

  Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) override {
    const double bytes = 2.0 * (size() - 1) / size() * static_cast<double>(count * size_of(dtype));
    return launch("all_reduce", count, bytes, [&](const Link& l) {
      return ncclAllReduce(data, data, z(count), type("all_reduce", dtype), operation_of(op), l.comm(), l.stream());
    });
  }

  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) override {
    return launch("reduce_scatter", count, others(count, dtype), [&](const Link& l) {
      return ncclReduceScatter(in, out, z(count), type("reduce_scatter", dtype), operation_of(op), l.comm(), l.stream());
    });
  }

  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    return launch("all_gather", count, others(count, dtype), [&](const Link& l) {
      return ncclAllGather(in, out, z(count), type("all_gather", dtype), l.comm(), l.stream());
    });
  }

  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    require(counts, "all_gather_v");
    const auto mine = counts[static_cast<std::size_t>(rank())];
    const ncclDataType_t t = type("all_gather_v", dtype);
    return launch("all_gather_v", 0, others(mine, dtype), [&](const Link& l) {
      return grouped([&](auto&& call) {
        std::int64_t place = 0;
        for (int r = 0; r < size(); ++r) {
          const std::int64_t n = counts[static_cast<std::size_t>(r)];
          std::byte* block = at(out, place, dtype);
          if (n > 0) call(ncclBroadcast(r == rank() ? in : block, block, z(n), t, r, l.comm(), l.stream()));
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
    return launch("broadcast", count, rank() == root ? static_cast<double>(count * size_of(dtype)) : 0, [&](const Link& l) {
      return ncclBroadcast(data, data, z(count), type("broadcast", dtype), root, l.comm(), l.stream());
    });
  }

  Handle send(const void* data, std::int64_t count, DType dtype, int to) override {
    const ncclDataType_t t = type("send", dtype);
    return launch_peer("send", to, count, static_cast<double>(count * size_of(dtype)),
                       [=](const Link& l) { return ncclSend(data, z(count), t, 1, l.comm(), l.stream()); });
  }

  Handle receive(void* data, std::int64_t count, DType dtype, int from) override {
    const ncclDataType_t t = type("receive", dtype);
    return launch_peer("receive", from, count, 0,
                       [=](const Link& l) { return ncclRecv(data, z(count), t, 0, l.comm(), l.stream()); });
  }

  /// Of the hosts, once their GPUs have ended what was called before.
  void barrier() override {
    job_->bind(where("barrier"));
    check_cuda(cudaStreamSynchronize(job_->compute), where("barrier"));
    check_cuda(cudaStreamSynchronize(main_->stream()), where("barrier"));
    throw_if_broken();
    control_->barrier();
    record("barrier", 1, 0, 0, 0);
  }

 private:
  /// Sends to, or receives from, one other rank: with a link of the two, made by the first of them, so that neither
  /// direction nor another peer can hold it up.
  struct Peer {
    std::unique_ptr<Link> link;
    std::shared_ptr<Lane> lane;
  };

  /// Makes the compute stream wait for the collective.
  struct Wait final : Handle::Operation {
    Wait(std::shared_ptr<NcclCommunicator> c, std::shared_ptr<Flight> f) : comm(std::move(c)), flight(std::move(f)) {}
    void wait() override {
      if (flight->task) flight->task->wait();
      comm->throw_if_broken();
      comm->job_->bind(comm->where(flight->collective));
      check_cuda(cudaStreamWaitEvent(comm->job_->compute, flight->end, 0), comm->where(flight->collective));
    }
    bool done() override {
      return (!flight->task || flight->task->done()) && cudaEventQuery(flight->end) != cudaErrorNotReady;
    }
    std::shared_ptr<NcclCommunicator> comm;  // a handle may outlive who asked for it
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

  /// Calls within `body` start together; their first error, or the group's. A group left open would swallow what this thread
  /// calls later.
  template <class Body>
  static ncclResult_t grouped(Body&& body) {
    ncclResult_t first = ncclGroupStart(), end = ncclSuccess;
    if (first != ncclSuccess) return first;
    {
      struct Group {
        ncclResult_t& end;
        ~Group() { end = ncclGroupEnd(); }
      } const group{end};
      body([&](ncclResult_t code) {
        if (first == ncclSuccess && code != ncclInProgress) first = code;
      });
    }
    return first != ncclSuccess ? first : end;
  }

  /// A flight whose data is there when the compute stream has come to now.
  std::shared_ptr<Flight> flight_of(const char* collective, std::int64_t count, double bytes) {
    if (count < 0) wrong(collective, fmt::format("negative count {}", count));
    throw_if_broken();
    const std::string place = where(collective);
    job_->bind(place);
    auto flight = std::make_shared<Flight>();
    flight->collective = collective, flight->bytes = bytes;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long record = 0;
    check_cuda(cudaStreamGetCaptureInfo(job_->compute, &status, &record), place);
    flight->recorded = status != cudaStreamCaptureStatusNone;
    if (flight->recorded && job_->record != record) job_->record = record, job_->last_recorded.reset();
    check_cuda(cudaEventCreateWithFlags(&flight->ready, cudaEventDisableTiming), place);
    check_cuda(cudaEventCreate(&flight->start), place);
    check_cuda(cudaEventCreate(&flight->end), place);
    check_cuda(cudaEventRecord(flight->ready, job_->compute), place);
    return flight;
  }

  template <class Body>
  void fly(Link& link, const std::shared_ptr<Flight>& flight, Body&& body) {
    const std::string place = where(flight->collective);
    flight->link = &link;
    check_cuda(cudaStreamWaitEvent(link.stream(), flight->ready, 0), place);
    if (!flight->recorded) check_cuda(cudaEventRecord(flight->start, link.stream()), place);
    else if (job_->last_recorded) check_cuda(cudaStreamWaitEvent(link.stream(), job_->last_recorded->end, 0), place);
    {
      const auto in_use = link.use(place);
      const ncclResult_t code = body(static_cast<const Link&>(link));
      link.check(code, place);
      if (code == ncclInProgress || flight->recorded) link.settle(place);  // what comes late would be no part of the record
    }
    check_cuda(cudaEventRecord(flight->end, link.stream()), place);
    if (flight->recorded) {
      job_->last_recorded = flight;
      return;
    }
    const std::scoped_lock lock(mutex_);
    flights_.push_back(flight);
    changed_.notify_all();
  }

  template <class Body>
  Handle launch(const char* collective, std::int64_t count, double bytes, Body&& body) {
    auto flight = flight_of(collective, count, bytes);
    fly(*main_, flight, body);
    return Handle(std::make_shared<Wait>(shared_from_this(), std::move(flight)));
  }

  template <class Body>
  Handle launch_peer(const char* collective, int other, std::int64_t count, double bytes, Body body) {
    if (other < 0 || other >= size() || other == rank())
      wrong(collective, fmt::format("peer {} of {} ranks, this is {}", other, size(), rank()));
    auto flight = flight_of(collective, count, bytes);
    // Its stream is another thread's, and two ranks alone do not order it among the collectives of all.
    if (flight->recorded) fail(Fault::runtime, where(collective), "it cannot be part of a recorded step; set run.cuda_graphs: off");
    const bool sends = std::string_view(collective) == "send";
    Peer* peer = nullptr;
    {
      const std::scoped_lock lock(mutex_);
      std::unique_ptr<Peer>& p = peers_[{other, sends}];
      if (!p) {
        p = std::make_unique<Peer>();
        p->lane = std::make_shared<Lane>([](Collective, const std::function<void()>& wait) { wait(); });
      }
      peer = p.get();
    }
    flight->task = peer->lane->submit(sends ? Collective::send : Collective::receive,
                                      [this, peer, other, sends, flight = flight.get(), keep = std::weak_ptr(flight), body] {
                                        job_->bind(where(flight->collective));
                                        if (!peer->link) {
                                          std::unique_ptr<Link> made = link_to(other, sends);
                                          const std::scoped_lock lock(mutex_);
                                          peer->link = std::move(made);
                                        }
                                        fly(*peer->link, keep.lock(), body);
                                      });
    return Handle(std::make_shared<Wait>(shared_from_this(), std::move(flight)));
  }

  std::unique_ptr<Link> link_to(int other, bool sends) {
    const std::string place = where(sends ? "send" : "receive");
    ncclUniqueId id;
    std::memset(&id, 0, sizeof id);
    if (sends) {
      if (ncclGetUniqueId(&id) != ncclSuccess) fail(Fault::runtime, place, "NCCL gives no id");
      control_->send(&id, sizeof id, DType::u8, other).wait();
    } else {
      control_->receive(&id, sizeof id, DType::u8, other).wait();
    }
    return std::make_unique<Link>(*job_, fmt::format("{} {} to {}", name(), sends ? rank() : other, sends ? other : rank()),
                                  id, 2, sends ? 0 : 1);
  }

  Handle exchange(const char* collective, const void* in, std::span<const std::int64_t> send_counts, void* out,
                  std::span<const std::int64_t> receive_counts, DType dtype) {
    require(send_counts, collective);
    require(receive_counts, collective);
    const auto me = static_cast<std::size_t>(rank());
    if (send_counts[me] != receive_counts[me])
      wrong(collective, "what a rank sends to itself is not what it receives from itself");
    const ncclDataType_t t = type(collective, dtype);
    const std::int64_t all = std::accumulate(send_counts.begin(), send_counts.end(), std::int64_t{0});
    return launch(collective, 0, static_cast<double>((all - send_counts[me]) * size_of(dtype)), [&](const Link& l) {
      return grouped([&](auto&& call) {
        std::int64_t from = 0, to = 0;
        for (int r = 0; r < size(); ++r) {
          const auto i = static_cast<std::size_t>(r);
          if (send_counts[i] > 0) call(ncclSend(at(in, from, dtype), z(send_counts[i]), t, r, l.comm(), l.stream()));
          if (receive_counts[i] > 0) call(ncclRecv(at(out, to, dtype), z(receive_counts[i]), t, r, l.comm(), l.stream()));
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

  /// Counts what has ended, and ends the job when a collective takes longer than the timeout or NCCL reports an error.
  void watch() {
    cudaSetDevice(job_->gpu);
    std::unique_lock lock(mutex_);
    while (!stop_ || (!flights_.empty() && !broken_)) {
      if (flights_.empty() || broken_) {
        changed_.wait(lock);
        continue;
      }
      auto flights = flights_;
      lock.unlock();
      std::string problem;
      std::deque<std::shared_ptr<Flight>> left;
      for (const auto& flight : flights) {
        const cudaError_t state = flight->asked ? cudaEventQuery(flight->end) : cudaErrorNotReady;
        if (state == cudaSuccess) {
          float milliseconds = 0;
          if (flight->link == nullptr) continue;
          cudaEventElapsedTime(&milliseconds, flight->start, flight->end);
          record(flight->collective, 1, flight->bytes, 1e-3 * milliseconds, 0);
          continue;
        }
        left.push_back(flight);
        if (!problem.empty()) continue;
        if (state != cudaErrorNotReady)
          problem = std::string("CUDA: ") + cudaGetErrorString(state);
        else
          problem = (flight->link != nullptr ? flight->link : main_.get())->fault();
        if (problem.empty() && started(*flight) &&
            std::chrono::duration<double>(Clock::now() - flight->since).count() > job_->control->timeout())
          problem = fmt::format("it has not ended within {:.3g} s: a rank of the group did not come, or a link is down",
                                job_->control->timeout());
        if (!problem.empty()) problem = fmt::format("{}: {}", where(flight->collective), problem);
      }
      if (!problem.empty()) {
        job_->control->fail_job(problem);
        std::vector<Link*> links{main_.get()};
        {
          const std::scoped_lock breaking(mutex_);
          broken_ = true, failure_ = problem;
          for (const auto& [key, peer] : peers_)
            if (peer->link) links.push_back(peer->link.get());
        }
        // A host that waits for its GPU would wait for ever: the collective that does not end is before all that is queued.
        for (Link* link : links) link->abort();
      }
      lock.lock();
      const bool idle = left.size() == flights.size();
      left.insert(left.end(), flights_.begin() + static_cast<std::ptrdiff_t>(flights.size()), flights_.end());
      flights_ = std::move(left);
      if (idle) changed_.wait_for(lock, std::chrono::milliseconds(1));
    }
  }

  /// Time counts from when the GPU comes to the collective: what is queued before it may be long.
  static bool started(Flight& flight) {
    if (cudaEventQuery(flight.start) == cudaSuccess) return true;
    flight.since = Clock::now();
    return false;
  }

  std::shared_ptr<const Job> job_;
  std::shared_ptr<Communicator> control_;
  std::unique_ptr<Link> main_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<int, bool>, std::unique_ptr<Peer>> peers_;
  std::deque<std::shared_ptr<Flight>> flights_;
  bool stop_ = false, broken_ = false;
  std::string failure_;
  std::thread thread_;
};

class NcclWorld final : public World {
 public:
  NcclWorld(std::shared_ptr<const Job> job, int version) : job_(std::move(job)), version_(version) {}
  int rank() const override { return job_->control->rank(); }
  int size() const override { return job_->control->size(); }
  int local_rank() const override { return job_->control->local_rank(); }
  int local_size() const override { return job_->control->local_size(); }
  std::string_view backend() const override { return "nccl"; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    if (ranks.size() == 1) return make_gpu_solo(std::move(name), std::move(ranks), job_->device);
    auto made = std::make_shared<NcclCommunicator>(job_, job_->control->make(std::move(name), std::move(ranks)));
    made_.push_back(made);
    return made;
  }
  std::string cannot_record() const override {
    return version_ >= NCCL_VERSION(2, 28, 0) ? "" : fmt::format("NCCL's collectives are recorded from 2.28 on, this is {}.{}", version_ / 10000, version_ / 100 % 100);
  }
  /// Whichever communicator finds that it does not end is ended itself, and so are all: the record waits for each of them.
  void replay(const std::function<void()>& work) override {
    const std::string place = "replaying a recorded step";
    job_->bind(place);
    struct Flights {
      cudaStream_t stream;
      std::vector<std::shared_ptr<Flight>> all;
      ~Flights() {
        for (const auto& flight : all) cudaEventRecord(flight->end, stream), flight->asked = true;
      }
    } flights{job_->compute, {}};
    for (const auto& made : made_) {
      const auto comm = made.lock();
      if (!comm) continue;
      const auto flight = std::make_shared<Flight>();
      flight->collective = "a recorded step", flight->asked = false;
      check_cuda(cudaEventCreateWithFlags(&flight->start, cudaEventDisableTiming), place);
      check_cuda(cudaEventCreateWithFlags(&flight->end, cudaEventDisableTiming), place);
      check_cuda(cudaEventRecord(flight->start, job_->compute), place);
      flights.all.push_back(flight);
      comm->watch_replay(flight);
    }
    work();
  }
  std::shared_ptr<void> shared_memory(std::size_t bytes) override {
    std::shared_ptr<void> memory = nccl_memory(*job_, bytes);
    if (!memory)
      fail(Fault::runtime, "cuda memory",
           fmt::format("NCCL cannot allocate {} bytes for collectives: {}", bytes, memory_words(*job_->device)));
    return {memory.get(), [memory, job = job_](void*) {}};
  }
  void at(std::int64_t step, std::string_view doing) override { job_->control->at(step, doing); }
  bool fail_job(const std::string& message) noexcept override { return job_->control->fail_job(message); }
  void end_failed(int exit_code) override { job_->control->end_failed(exit_code); }
  double timeout() const override { return job_->control->timeout(); }

 private:
  std::shared_ptr<const Job> job_;
  int version_;
  std::vector<std::weak_ptr<NcclCommunicator>> made_;
};

}  // namespace
}  // namespace capstan::comm

extern "C" __attribute__((visibility("default"))) bool capstan_nccl_open(int interface,
                                                                         std::shared_ptr<capstan::World> control,
                                                                         std::shared_ptr<capstan::Device> device,
                                                                         capstan::GpuRanks& ranks) {
  using namespace capstan;
  if (interface != kernels::cuda::gpu_interface) return false;
  auto job = std::make_shared<comm::Job>();
  const kernels::cuda::Gpu& gpu = gpu_of(*device);
  job->control = std::move(control), job->device = std::move(device);
  job->gpu = gpu.index(), job->compute = static_cast<cudaStream_t>(gpu.stream());
  int version = 0;
  ncclGetVersion(&version);
  ranks.words = fmt::format("by NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
  ranks.world = std::make_shared<comm::NcclWorld>(std::move(job), version);
  return true;
}

static_assert(std::is_same_v<decltype(&capstan_nccl_open), capstan::OpenNccl>);
