// MPI, entered, called and left by one thread.
#include "comm/mpi_engine.h"

#include <capstan/error.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <numeric>

namespace capstan::comm {
namespace {

constexpr int kBeat = 1, kFailed = 2;
constexpr std::int64_t kMillisecond = 1'000'000;
constexpr std::int64_t kBeatEvery = 250 * kMillisecond, kSuperviseEvery = 100 * kMillisecond;
// A process that died is left this long to those that wait for it: they know in what it was expected.
constexpr std::int64_t kGoneGrace = 150 * kMillisecond;
// A main thread that computes is given this long to see that the job failed: before its message is printed for it, and
// before its process is ended.
constexpr std::int64_t kPrintGrace = 500 * kMillisecond, kEndGrace = 2500 * kMillisecond;
// Hosts that all tell all of their ranks; more tell their neighbours.
constexpr int kAllHosts = 32;
constexpr std::int64_t kPiece = std::int64_t{1} << 30;

struct BeatRow {
  std::int64_t step;
  std::int32_t world_rank, pid;
  std::uint32_t phase;
  std::uint8_t gone, stopped, blocked;
  char doing[96];
};

struct FailedText {
  std::uint8_t names_collective;
  char where[64];
  char text[2048];
};

std::string mpi_text(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  return std::string(text, static_cast<std::size_t>(length));
}

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) fail(Fault::runtime, "MPI", std::string(call) + ": " + mpi_text(code));
}

}  // namespace

MpiEngine::MpiEngine(double timeout, int ranks_per_host) : timeout_(timeout), ranks_per_host_(ranks_per_host) {
  sigset_t all, before;  // signals are the main thread's
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  std::unique_lock lock(mutex_);
  ready_.wait(lock, [&] { return entered_; });
  if (error_) {
    lock.unlock();
    thread_.join();
    std::rethrow_exception(error_);
  }
}

MpiEngine::~MpiEngine() {
  std::unique_lock lock(mutex_);
  stop_ = true;
  wake_.notify_all();
  if (!ready_.wait_for(lock, std::chrono::duration<double>(timeout_ + 5), [&] { return left_; })) {
    std::fprintf(stderr, "error: [rank %d] the other ranks did not leave MPI within %.3g s; this rank leaves without them\n",
                 rank_, timeout_ + 5);
    std::fflush(nullptr);
    _exit(1);
  }
  lock.unlock();
  thread_.join();
}

void MpiEngine::enter() {
  int initialized = 0, finalized = 0, provided = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized || finalized) fail(Fault::programming, "MPI", "a process can enter MPI once");
  check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
  if (provided < MPI_THREAD_FUNNELED) fail(Fault::runtime, "MPI", "this MPI does not work in programs with threads");
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  check(MPI_Comm_dup(MPI_COMM_WORLD, &data_comm_), "MPI_Comm_dup");
  check(MPI_Comm_dup(MPI_COMM_WORLD, &control_comm_), "MPI_Comm_dup");
  MPI_Comm_set_errhandler(data_comm_, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(control_comm_, MPI_ERRORS_RETURN);

  check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host_comm_), "MPI_Comm_split_type");
  int local_size = 0, local_rank = 0, first = rank_;
  if (ranks_per_host_ > 0) {
    MPI_Comm part = MPI_COMM_NULL;
    MPI_Comm_rank(host_comm_, &local_rank);
    check(MPI_Comm_split(host_comm_, local_rank / ranks_per_host_, rank_, &part), "MPI_Comm_split");
    host_comm_ = part;
  }
  MPI_Comm_size(host_comm_, &local_size);
  MPI_Comm_rank(host_comm_, &local_rank);
  local_.resize(static_cast<std::size_t>(local_size));
  check(MPI_Allgather(&rank_, 1, MPI_INT, local_.data(), 1, MPI_INT, host_comm_), "MPI_Allgather");
  MPI_Bcast(&first, 1, MPI_INT, 0, host_comm_);
  std::vector<int> firsts(static_cast<std::size_t>(size_));
  check(MPI_Allgather(&first, 1, MPI_INT, firsts.data(), 1, MPI_INT, MPI_COMM_WORLD), "MPI_Allgather");
  std::vector<int> distinct = firsts;
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  hosts_ = static_cast<int>(distinct.size());
  for (const int f : firsts)
    host_of_.push_back(static_cast<int>(std::lower_bound(distinct.begin(), distinct.end(), f) - distinct.begin()));
  const int host = host_of_[static_cast<std::size_t>(rank_)];
  for (int r = 0; r < size_; ++r)
    if (host_of_[static_cast<std::size_t>(r)] != host) other_hosts_ranks_.push_back(r);
  for (int h = 0; h < hosts_; ++h) {
    const int apart = std::min((h - host + hosts_) % hosts_, (host - h + hosts_) % hosts_);
    if (h != host && (hosts_ <= kAllHosts || apart <= 2)) beat_to_.push_back(distinct[static_cast<std::size_t>(h)]);
  }

  // Address space of a file without a name: pages come as they are used, and go with the last process.
  long long bytes = 0;
  if (local_rank == 0) {
    struct statvfs shm {};
    const auto room =
        statvfs("/dev/shm", &shm) == 0 ? static_cast<long long>(shm.f_bavail) * static_cast<long long>(shm.f_frsize) : 0;
    bytes = std::max(room / 2, 16LL << 20);
  }
  MPI_Bcast(&bytes, 1, MPI_LONG_LONG, 0, host_comm_);
  void* base = nullptr;
  check(MPI_Win_allocate_shared(local_rank == 0 ? static_cast<MPI_Aint>(bytes) : 0, 1, MPI_INFO_NULL, host_comm_, &base,
                                &window_),
        "MPI_Win_allocate_shared");
  MPI_Aint window_bytes = 0;
  int unit = 0;
  check(MPI_Win_shared_query(window_, 0, &window_bytes, &unit, &base), "MPI_Win_shared_query");
  // The window starts somewhere in a page, the same place on all ranks.
  const auto address = (reinterpret_cast<std::uintptr_t>(base) + 4095) & ~std::uintptr_t{4095};
  memory_ = std::shared_ptr<void>(reinterpret_cast<void*>(address), [](void*) {});
  if (local_rank == 0) Segment::format(memory_, static_cast<std::size_t>(bytes) - 8192, local_size, hosts_ > 1 ? size_ : 0);
  MPI_Barrier(host_comm_);
}

void MpiEngine::run() {
  try {
    enter();
  } catch (...) {
    const std::scoped_lock lock(mutex_);
    error_ = std::current_exception();
    entered_ = true;
    ready_.notify_all();
    return;
  }
  std::unique_lock lock(mutex_);
  entered_ = true;
  ready_.notify_all();
  std::int64_t next = monotonic_ns();
  int quiet = 0;
  while (!stop_) {
    std::deque<Posted> posted;
    posted.swap(queue_);
    lock.unlock();
    for (const Posted& p : posted) start(p);
    if (abandon_) drop_messages();
    if (tell_) next = 0;
    bool moved = !posted.empty() || test();
    if (hosts_ > 1 && (monotonic_ns() >= next || !active_.empty())) listen();
    if (monotonic_ns() >= next) {
      supervise();
      next = monotonic_ns() + (hosts_ > 1 ? 25 * kMillisecond : kSuperviseEvery);
    }
    quiet = moved ? 0 : quiet + 1;
    // Nothing moves in MPI unless it is called. Who waits for a message sleeps; this thread looks for it, at first all the
    // time, then every few microseconds, and gives its core to compute in between.
    const bool polling = !active_.empty();
    if (polling && quiet > 20) std::this_thread::sleep_for(std::chrono::microseconds(std::min(100, quiet)));
    else if (polling) std::this_thread::yield();
    lock.lock();
    if (!polling && queue_.empty() && !stop_ && !tell_.load())
      wake_.wait_for(lock, std::chrono::nanoseconds(std::max<std::int64_t>(next - monotonic_ns(), 100'000)));
  }
  lock.unlock();
  leave();
  lock.lock();
  left_ = true;
  ready_.notify_all();
}

void MpiEngine::leave() {
  bool job_failed = false;
  {
    const std::scoped_lock guard(watch_mutex_);
    job_failed = failed() || failed_at_ != 0;
  }
  if (job_failed) return;  // MPI_Finalize would wait for ranks that never come
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Ibarrier(control_comm_, &request);
  const std::int64_t deadline = monotonic_ns() + static_cast<std::int64_t>(timeout_ * 1e9);
  int done = 0;
  for (int i = 0; !done && monotonic_ns() < deadline; ++i) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (hosts_ > 1) listen();
    if (!done) std::this_thread::sleep_for(std::chrono::microseconds(std::min(1000, 10 * i)));
  }
  if (!done) {
    std::fprintf(stderr, "error: [rank %d] other ranks have not left the job %.3g s after this one\n", rank_, timeout_);
    std::fflush(nullptr);
    _exit(1);
  }
  memory_.reset();
  MPI_Win_free(&window_);
  MPI_Finalize();
}

std::shared_ptr<Message> MpiEngine::post(Posted posted) {
  posted.message = std::make_shared<Message>();
  auto message = posted.message;
  const std::scoped_lock lock(mutex_);
  queue_.push_back(std::move(posted));
  wake_.notify_all();
  return message;
}

std::shared_ptr<Message> MpiEngine::send(int world_rank, std::uint32_t tag, const void* data, std::int64_t bytes) {
  return post({nullptr, const_cast<void*>(data), bytes, world_rank, tag, true});
}

std::shared_ptr<Message> MpiEngine::receive(int world_rank, std::uint32_t tag, void* data, std::int64_t bytes) {
  return post({nullptr, data, bytes, world_rank, tag, false});
}

void MpiEngine::start(const Posted& p) {
  // MPI counts in int; what is longer goes in pieces, and the last one's end is the message's.
  for (std::int64_t at = 0; at == 0 || at < p.bytes; at += kPiece) {
    const int count = static_cast<int>(std::min(kPiece, p.bytes - at));
    Posted piece = p;
    piece.data = static_cast<std::byte*>(p.data) + at;
    piece.bytes = count;
    if (at + kPiece < p.bytes) piece.message = std::make_shared<Message>();
    MPI_Request request = MPI_REQUEST_NULL;
    const int code = p.sends ? MPI_Isend(piece.data, count, MPI_BYTE, p.peer, static_cast<int>(p.tag), data_comm_, &request)
                             : MPI_Irecv(piece.data, count, MPI_BYTE, p.peer, static_cast<int>(p.tag), data_comm_, &request);
    if (code != MPI_SUCCESS) {
      p.message->error = mpi_text(code);
      Watch::post(p.message->done, p.message->waiters, 2);
      return;
    }
    requests_.push_back(request);
    active_.push_back(std::move(piece));
  }
}

void MpiEngine::finish(std::size_t i, const MPI_Status& status) {
  const Posted& p = active_[i];
  int count = static_cast<int>(p.bytes);
  if (!p.sends && status.MPI_ERROR == MPI_SUCCESS) MPI_Get_count(&status, MPI_BYTE, &count);
  const bool whole = status.MPI_ERROR == MPI_SUCCESS && count == p.bytes;
  if (!whole)
    p.message->error =
        status.MPI_ERROR != MPI_SUCCESS
            ? mpi_text(status.MPI_ERROR)
            : fmt::format("{} bytes came where {} were expected: both ranks must make the same call", count, p.bytes);
  Watch::post(p.message->done, p.message->waiters, whole ? 1 : 2);
}

bool MpiEngine::test() {
  if (active_.empty()) return false;
  std::vector<int> indices(requests_.size());
  std::vector<MPI_Status> statuses(requests_.size());
  int completed = 0;
  const int code =
      MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &completed, indices.data(), statuses.data());
  if (completed == MPI_UNDEFINED || completed <= 0) return false;
  for (int k = 0; k < completed; ++k) {
    const auto u = static_cast<std::size_t>(k);
    if (code != MPI_ERR_IN_STATUS) statuses[u].MPI_ERROR = code;
    finish(static_cast<std::size_t>(indices[u]), statuses[u]);
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < active_.size(); ++i)
    if (requests_[i] != MPI_REQUEST_NULL) {
      if (kept != i) requests_[kept] = requests_[i], active_[kept] = std::move(active_[i]);
      ++kept;
    }
  requests_.resize(kept);
  active_.resize(kept);
  return true;
}

void MpiEngine::drop_messages() {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    if (!active_[i].sends) MPI_Cancel(&requests_[i]);
    MPI_Request_free(&requests_[i]);
    active_[i].message->error = "given up";
    Watch::post(active_[i].message->done, active_[i].message->waiters, 2);
  }
  requests_.clear();
  active_.clear();
  abandoned_ = true;
}

void MpiEngine::abandon() {
  abandon_ = true;
  wake_.notify_all();
  for (int i = 0; i < 1000 && !abandoned_; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void MpiEngine::listen() {
  while (true) {
    int there = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, control_comm_, &there, &status) != MPI_SUCCESS || !there) return;
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    std::vector<std::byte> data(static_cast<std::size_t>(bytes));
    MPI_Recv(data.data(), bytes, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, control_comm_, MPI_STATUS_IGNORE);
    const std::scoped_lock guard(watch_mutex_);
    if (!watch_) continue;
    if (status.MPI_TAG == kBeat) {
      for (std::size_t at = 0; at + sizeof(BeatRow) <= data.size(); at += sizeof(BeatRow)) {
        BeatRow row;
        std::memcpy(&row, data.data() + at, sizeof row);
        if (row.world_rank < 0 || row.world_rank >= size_) continue;
        RemotePage& page = watch_->segment().remote(row.world_rank);
        page.step = row.step;
        page.pid = row.pid;
        page.phase = static_cast<Phase>(row.phase);
        page.gone = row.gone;
        page.stopped = row.stopped;
        page.blocked = row.blocked;
        row.doing[sizeof row.doing - 1] = 0;
        page.doing.set(row.doing);
        page.heard = monotonic_ns();
      }
    } else if (status.MPI_TAG == kFailed && data.size() == sizeof(FailedText)) {
      FailedText text;
      std::memcpy(&text, data.data(), sizeof text);
      text.where[sizeof text.where - 1] = text.text[sizeof text.text - 1] = 0;
      watch_->set_failure(text.where, text.text, text.names_collective != 0, false);
    }
  }
}

void MpiEngine::send_control(int kind, std::vector<std::byte> data, const std::vector<int>& to) {
  for (const int peer : to) {
    // A peer that does not take what it has been sent gets no more beats.
    const bool stuck = std::any_of(controls_.begin(), controls_.end(), [&](const Control& c) { return c.peer == peer; });
    if (kind == kBeat && stuck) continue;
    Control& c = controls_.emplace_back(Control{data, MPI_REQUEST_NULL, peer});
    if (MPI_Isend(c.data.data(), static_cast<int>(c.data.size()), MPI_BYTE, peer, kind, control_comm_, &c.request) !=
        MPI_SUCCESS)
      controls_.pop_back();
  }
}

void MpiEngine::beat() {
  std::vector<std::byte> data(local_.size() * sizeof(BeatRow));
  for (std::size_t i = 0; i < local_.size(); ++i) {
    const RankState s = watch_->state(local_[i]);
    BeatRow row{};
    row.step = s.step;
    row.world_rank = local_[i];
    row.pid = s.pid;
    row.phase = static_cast<std::uint32_t>(s.phase);
    row.gone = s.gone;
    row.stopped = s.stopped;
    row.blocked = s.blocked;
    s.doing.copy(row.doing, sizeof row.doing - 1);
    std::memcpy(data.data() + i * sizeof row, &row, sizeof row);
  }
  send_control(kBeat, std::move(data), beat_to_);
}

// A message to a rank never talked to opens a connection, and where that fails MPI ends this process: hosts that went silent
// are left to find out by themselves.
std::vector<int> MpiEngine::reachable() const {
  std::vector<bool> heard(static_cast<std::size_t>(hosts_), hosts_ > kAllHosts);
  for (const int r : other_hosts_ranks_)
    if (const RankState s = remote(r); s.known && s.silent < 1e-9 * 4 * kBeatEvery)
      heard[static_cast<std::size_t>(host_of_[static_cast<std::size_t>(r)])] = true;
  std::vector<int> ranks;
  for (const int r : other_hosts_ranks_)
    if (heard[static_cast<std::size_t>(host_of_[static_cast<std::size_t>(r)])]) ranks.push_back(r);
  return ranks;
}

void MpiEngine::supervise() {
  std::function<void()> end;
  {
    const std::scoped_lock guard(watch_mutex_);
    if (!watch_) return;
    const std::int64_t now = monotonic_ns();
    StatusPage& page = watch_->own();
    page.heartbeat = now;
    std::erase_if(controls_, [](Control& c) {
      int done = 0;
      return MPI_Test(&c.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done;
    });
    if (tell_.exchange(false)) {
      const FailureRecord& record = watch_->segment().header().failure;
      FailedText text{};
      text.names_collective = record.names_collective;
      std::memcpy(text.where, record.where, sizeof text.where);
      std::memcpy(text.text, record.text, sizeof text.text);
      std::vector<std::byte> data(sizeof text);
      std::memcpy(data.data(), &text, sizeof text);
      if (hosts_ > 1) send_control(kFailed, std::move(data), reachable());
    }
    if (now - last_beat_ >= kBeatEvery) {
      last_beat_ = now;
      if (!beat_to_.empty() && watch_->local_rank() == 0) beat();
      // Each looks after its neighbour, so that a death is seen while nobody waits.
      if (local_.size() > 1 && !watch_->failed()) {
        const int next = local_[static_cast<std::size_t>(watch_->local_rank() + 1) % local_.size()];
        const RankState s = watch_->state(next);
        if (!s.gone || s.phase != Phase::running) gone_at_ = 0;
        else if (gone_at_ == 0) gone_at_ = now;
        else if (now - gone_at_ >= kGoneGrace) watch_->report_if_gone(next);
      }
    }
    if (watch_->failed() && page.phase.load() == Phase::running) {
      if (failed_at_ == 0) failed_at_ = now;
      if (now - failed_at_ >= kPrintGrace && watch_->failure_finder() == rank_ && !printed_->exchange(true)) {
        std::fprintf(stderr, "error: [%s] %s\n", watch_->failure_where().c_str(), watch_->failure_text().c_str());
        std::fflush(stderr);
      }
      if (now - failed_at_ >= kEndGrace) end = end_;
    }
    idle_ = controls_.empty() && !tell_.load();
  }
  if (end) end();
}

void MpiEngine::watch(Watch* watch, std::atomic<bool>* printed, std::function<void()> end) {
  const std::scoped_lock guard(watch_mutex_);
  watch_ = watch;
  printed_ = printed;
  end_ = std::move(end);
  watch_->on_failure([this] {
    idle_ = false;
    tell_ = true;
    wake_.notify_all();
  });
  if (hosts_ > 1) watch_->set_remote([this](int world_rank) { return remote(world_rank); }, size_);
}

void MpiEngine::unwatch() {
  const std::scoped_lock guard(watch_mutex_);
  if (watch_ && watch_->failed() && failed_at_ == 0) failed_at_ = monotonic_ns();
  watch_ = nullptr;
}

RankState MpiEngine::remote(int world_rank) const {
  auto segment = Segment::attach(memory_);
  const RemotePage& page = segment.remote(world_rank);
  RankState s;
  const std::int64_t heard = page.heard;
  s.known = heard > 0;
  s.phase = page.phase;
  s.gone = page.gone != 0;
  s.stopped = page.stopped != 0;
  s.blocked = page.blocked != 0;
  s.pid = page.pid;
  s.step = page.step;
  s.doing = page.doing.get();
  s.silent = s.known ? 1e-9 * static_cast<double>(monotonic_ns() - heard) : -1;
  return s;
}

void MpiEngine::flush_failure(double seconds) {
  if (hosts_ == 1) return;
  const std::int64_t deadline = monotonic_ns() + static_cast<std::int64_t>(seconds * 1e9);
  while (!idle_.load() && monotonic_ns() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

}  // namespace capstan::comm
