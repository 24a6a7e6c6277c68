// Processes of one host that meet in /dev/shm.
#include "launch/shared_memory_world.h"

#include "comm/segment.h"
#include "comm/shared_world.h"

#include <capstan/error.h>

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

namespace capstan::launch {
namespace {

using comm::Phase;
using comm::Segment;
using comm::StatusPage;
using std::chrono::steady_clock;

constexpr std::size_t most_bytes = std::size_t{4} << 30, least_bytes = std::size_t{16} << 20;
constexpr auto moment = std::chrono::milliseconds(5);
constexpr auto farewell = std::chrono::seconds(2);  // in which the others may end by themselves

bool alive(int pid) { return pid > 0 && (kill(pid, 0) == 0 || errno == EPERM); }

steady_clock::time_point after(double seconds) {
  return steady_clock::now() + std::chrono::duration_cast<steady_clock::duration>(std::chrono::duration<double>(seconds));
}

[[noreturn]] void no_memory(const std::string& what) {
  fail(Fault::runtime, "launch",
       fmt::format("{}: {}; the ranks of a host meet in /dev/shm, make it larger or free it", what, std::strerror(errno)));
}

std::shared_ptr<void> map(int file, std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (base == MAP_FAILED) no_memory(fmt::format("cannot map {} MiB", bytes >> 20));
  return {base, [bytes](void* p) { munmap(p, bytes); }};
}

/// Laid out under a name of its own first: nobody sees half of it.
Segment lay_out(const std::string& file, int size) {
  struct statvfs disk {};
  if (statvfs("/dev/shm", &disk) != 0) no_memory("/dev/shm");
  const std::size_t bytes =
      std::min(most_bytes, static_cast<std::size_t>(disk.f_bavail) * disk.f_frsize / 2) & ~std::size_t{4095};
  if (bytes < least_bytes) errno = ENOSPC, no_memory(fmt::format("{} MiB are free in /dev/shm", 2 * bytes >> 20));
  const std::string fresh = fmt::format("{}.{}", file, getpid());
  const int handle = open(fresh.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (handle < 0) no_memory(fresh);
  if (ftruncate(handle, static_cast<off_t>(bytes)) != 0) {
    unlink(fresh.c_str());
    close(handle);
    no_memory(fresh);
  }
  std::shared_ptr<void> memory = map(handle, bytes);
  close(handle);
  Segment segment = Segment::format(std::move(memory), bytes, size, 0);
  segment.page(0).pid = static_cast<std::int32_t>(getpid());  // by which others know that this job lives
  if (rename(fresh.c_str(), file.c_str()) != 0) {
    unlink(fresh.c_str());
    no_memory(file);
  }
  return segment;
}

Segment find(const std::string& file, const std::string& name, int rank, int size, double timeout) {
  const auto deadline = after(timeout);
  do {
    const int handle = open(file.c_str(), O_RDWR | O_CLOEXEC);
    struct stat about {};
    if (handle >= 0 && fstat(handle, &about) == 0 && about.st_uid == getuid()) {
      std::shared_ptr<void> memory = map(handle, static_cast<std::size_t>(about.st_size));
      close(handle);
      Segment segment = Segment::attach(std::move(memory));
      if (alive(segment.page(0).pid)) {  // or a dead job left it, and rank 0 has not come yet
        if (segment.header().local_size != size)
          fail(Fault::input, "launch",
               fmt::format("rank {} thinks that the job at {} has {} ranks, rank 0 that it has {}", rank, name, size,
                           segment.header().local_size));
        if (segment.page(rank).phase != Phase::absent)
          fail(Fault::input, "launch",
               fmt::format("there is a rank {} at {} already: give each rank its own RANK, and each job its own MASTER_PORT",
                           rank, name));
        return segment;
      }
    } else if (handle >= 0) {
      close(handle);
    }
    std::this_thread::sleep_for(moment);
  } while (steady_clock::now() < deadline);
  fail(Fault::runtime, "rank 0",
       fmt::format("rank 0 did not come to {} within {:.3g} s; rank {} waited", name, timeout, rank));
}

class SharedMemoryWorld final : public comm::SharedWorld {
 public:
  explicit SharedMemoryWorld(std::shared_ptr<comm::WorldCore> core) : SharedWorld(std::move(core), "shared memory") {}

  /// Until every rank has come.
  void wait_for_all(const std::string& name) {
    const Segment& segment = core_->watch.segment();
    const auto deadline = after(timeout());
    for (int r = 0; r < size(); ++r) {
      while (segment.page(r).phase == Phase::absent) {
        core_->watch.throw_if_failed({});
        if (steady_clock::now() > deadline)
          fail(Fault::runtime, fmt::format("rank {}", r),
               fmt::format("rank {} did not come to {} within {:.3g} s; start all {} ranks", r, name, timeout(), size()));
        std::this_thread::sleep_for(moment);
      }
    }
  }

  void end_failed(int exit_code) override {
    std::fflush(nullptr);
    const Segment& segment = core_->watch.segment();
    const auto others = [&] {
      std::vector<int> pids;
      for (int r = 0; r < size(); ++r) {
        const StatusPage& page = segment.page(r);
        const Phase phase = page.phase;
        if (r != rank() && (phase == Phase::running || phase == Phase::failed) && alive(page.pid)) pids.push_back(page.pid);
      }
      return pids;
    };
    for (const auto deadline = steady_clock::now() + farewell; steady_clock::now() < deadline && !others().empty();) {
      // A rank that waits for this one to end is one that does the same.
      bool all_failed = true;
      for (int r = 0; r < size(); ++r) all_failed = all_failed && segment.page(r).phase != Phase::running;
      if (all_failed) break;
      std::this_thread::sleep_for(moment);
    }
    for (int r = 0; r < size(); ++r)
      if (r != rank() && segment.page(r).phase == Phase::running && alive(segment.page(r).pid))
        kill(segment.page(r).pid, SIGKILL);
    _exit(exit_code);
  }
};

}  // namespace

std::string shared_memory_file(const std::string& name) {
  return fmt::format("/dev/shm/capstan-{}-{:016x}", getuid(),
                     static_cast<std::uint64_t>(XXH3_64bits(name.data(), name.size())));
}

std::shared_ptr<World> make_shared_memory_world(const std::string& name, int rank, int size, double timeout_seconds) {
  if (size < 1 || rank < 0 || rank >= size)
    fail(Fault::programming, "launch", fmt::format("rank {} of {} ranks", rank, size));
  if (size == 1) return make_single_world();
  const std::string file = shared_memory_file(name);
  Segment segment = rank == 0 ? lay_out(file, size) : find(file, name, rank, size, timeout_seconds);
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  auto world = std::make_shared<SharedMemoryWorld>(
      std::make_shared<comm::WorldCore>(std::move(segment), rank, size, std::move(ranks), timeout_seconds));
  if (rank == 0) {
    try {
      world->wait_for_all(name);
    } catch (const Error& e) {
      unlink(file.c_str());
      world->fail_job(e.what());
      throw;
    }
    unlink(file.c_str());
  }
  return world;
}

}  // namespace capstan::launch
