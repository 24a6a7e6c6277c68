// A rank of a job whose ranks share memory on each host; ranks as threads.
#include "comm/shared_world.h"

#include "comm/failure.h"

#include <capstan/error.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>

namespace capstan {
namespace comm {

WorldCore::WorldCore(Segment segment, int rank_, int size_, std::vector<int> local_, double timeout)
    : rank(rank_),
      size(size_),
      local(std::move(local_)),
      watch(std::move(segment), static_cast<int>(std::find(local.begin(), local.end(), rank_) - local.begin()), local,
            timeout) {
  StatusPage& page = watch.own();
  page.pid = static_cast<std::int32_t>(getpid());
  page.world_rank = rank;
  page.phase.store(Phase::running, std::memory_order_release);
}

WorldCore::~WorldCore() { watch.own().phase.store(Phase::left, std::memory_order_release); }

void WorldCore::claim_tag(std::uint32_t tag, const std::string& name, const std::vector<int>& ranks) {
  const std::scoped_lock lock(mutex_);
  const auto [at, fresh] = tags_.try_emplace(tag, name, ranks);
  if (!fresh && at->second != std::pair(name, ranks))
    fail(Fault::runtime, "communicator '" + name + "'",
         fmt::format("its messages cannot be told from those of '{}', whose name hashes alike: rename one of them",
                     at->second.first));
}

int checked_group(const std::string& name, const std::vector<int>& ranks, int rank, int world) {
  const auto text = [&] { return fmt::format("{}", fmt::join(ranks, ", ")); };
  if (ranks.empty() || !std::is_sorted(ranks.begin(), ranks.end(), std::less_equal<>()) || ranks.front() < 0 ||
      ranks.back() >= world)
    fail(Fault::programming, "communicator '" + name + "'",
         fmt::format("ranks must ascend within 0 .. {}, got {}", world - 1, text()));
  const auto at = std::find(ranks.begin(), ranks.end(), rank);
  if (at == ranks.end())
    fail(Fault::programming, "communicator '" + name + "'", fmt::format("rank {} is not among its ranks {}", rank, text()));
  return static_cast<int>(at - ranks.begin());
}

std::shared_ptr<Communicator> SharedWorld::make(std::string name, std::vector<int> ranks) {
  checked_group(name, ranks, rank(), size());
  if (ranks.size() == 1) return make_solo(std::move(name), std::move(ranks));
  return make_group(core_, std::move(name), std::move(ranks));
}

std::shared_ptr<void> SharedWorld::shared_memory(std::size_t bytes) {
  if (size() == 1) return World::shared_memory(bytes);
  std::byte* memory = core_->watch.segment().take(bytes, timeout());
  if (!memory) return World::shared_memory(bytes);
  return {memory, [core = core_, bytes](void* p) {
            try {
              core->watch.segment().give_back(static_cast<std::byte*>(p), bytes, core->watch.timeout());
            } catch (...) {
              // The directory's lock died with a rank: the memory goes with the job.
            }
          }};
}

void SharedWorld::at(std::int64_t step, std::string_view doing) {
  StatusPage& page = core_->watch.own();
  page.step.store(step, std::memory_order_relaxed);
  page.doing.set(doing);
}

std::string SharedWorld::awaited_in() const {
  // Long enough for the others to come where this rank will not.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(0.5, timeout() / 4));
  do {
    for (std::size_t local = 0; local < core_->local.size(); ++local) {
      for (const WaitEntry& entry : core_->watch.segment().page(static_cast<int>(local)).waits) {
        if (entry.state.load(std::memory_order_acquire) != 2 || entry.missing != rank()) continue;
        const Site site{core_->watch.segment().at<Slot>(entry.slot), static_cast<Collective>(entry.collective.load()),
                        entry.sequence};
        return fmt::format("; it was expected in {} by rank {}", core_->watch.describe(site), core_->local[local]);
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  } while (std::chrono::steady_clock::now() < deadline);
  return "";
}

bool SharedWorld::fail_job(const std::string& message) noexcept {
  try {
    Watch& watch = core_->watch;
    StatusPage& page = watch.own();
    const std::int64_t step = page.step;
    const std::string doing = page.doing.get();
    const std::string at = step >= 0 ? fmt::format("step {}{}{}", step, doing.empty() ? "" : ", ", doing)
                                     : std::string("before the first step");
    const std::string awaited = step >= 0 && !watch.failed() ? awaited_in() : std::string();
    watch.set_failure(fmt::format("rank {}", rank()), fmt::format("rank {} ({}) failed: {}{}", rank(), at, message, awaited),
                      !awaited.empty());
    page.phase.store(Phase::failed, std::memory_order_release);
    return watch.failure_finder() == rank() && !core_->printed.exchange(true);
  } catch (...) {
    return true;
  }
}

void SharedWorld::end_failed(int) {
  fail(Fault::programming, "communicator", "ranks that are threads of one process end by returning");
}

namespace {

class SingleWorld final : public World {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  int local_rank() const override { return 0; }
  int local_size() const override { return 1; }
  std::string_view backend() const override { return "single"; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    checked_group(name, ranks, 0, 1);
    return make_solo(std::move(name), std::move(ranks));
  }
  void at(std::int64_t, std::string_view) override {}
  bool fail_job(const std::string&) noexcept override { return true; }
  void end_failed(int exit_code) override { std::exit(exit_code); }
  double timeout() const override { return 0; }
};

}  // namespace
}  // namespace comm

std::string failure_of(const World& world) {
  const auto* shared = dynamic_cast<const comm::SharedWorld*>(&world);
  if (shared == nullptr || !shared->watch().failed()) return "";
  return fmt::format("[{}] {}", shared->watch().failure_where(), shared->watch().failure_text());
}

std::shared_ptr<World> make_single_world() { return std::make_shared<comm::SingleWorld>(); }

std::vector<std::shared_ptr<World>> make_thread_worlds(int size, double timeout_seconds) {
  if (size < 1)
    fail(Fault::programming, "communicator", "a world of " + std::to_string(size) + " ranks: expected at least 1");
  // Address space; pages come as they are used.
  const std::size_t bytes = std::size_t{4} << 30;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    fail(Fault::runtime, "communicator", fmt::format("no address space for {} ranks: {}", size, std::strerror(errno)));
  const std::shared_ptr<void> memory(base, [bytes](void* p) { munmap(p, bytes); });
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  comm::Segment::format(memory, bytes, size, 0);
  std::vector<std::shared_ptr<World>> worlds;
  for (int r = 0; r < size; ++r)
    worlds.push_back(std::make_shared<comm::SharedWorld>(
        std::make_shared<comm::WorldCore>(comm::Segment::attach(memory), r, size, ranks, timeout_seconds), "threads"));
  return worlds;
}

}  // namespace capstan
