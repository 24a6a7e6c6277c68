// Ranks as MPI processes.
#include "comm/mpi_world.h"

#include "comm/mpi_engine.h"
#include "comm/shared_world.h"

#include <capstan/error.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>

namespace capstan {
namespace comm {
namespace {

/// Keeps MPI until the last communicator has gone.
struct MpiCore : WorldCore {
  MpiCore(std::shared_ptr<MpiEngine> e, double timeout)
      : WorldCore(Segment::attach(e->memory()), e->rank(), e->size(), e->local(), timeout), engine(e) {
    transport = e;
    several_hosts = e->hosts() > 1;
    engine->watch(&watch, &printed, [this] { end(1); });
  }
  ~MpiCore() { engine->unwatch(); }

  /// Ends this process of a failed job.
  [[noreturn]] void end(int exit_code) {
    StatusPage& page = watch.own();
    // From here on this rank counts as left; the others are given a moment to see why.
    page.phase.store(Phase::left, std::memory_order_release);
    std::fflush(nullptr);
    engine->flush_failure(0.5);
    const auto still = [&](bool finder_only) {
      for (const int r : local) {
        if (r == rank || (finder_only && r != watch.failure_finder())) continue;
        const RankState s = watch.state(r);
        if (s.known && !s.gone && (finder_only ? s.phase != Phase::left : s.phase == Phase::running)) return true;
      }
      return false;
    };
    const bool finder = watch.failure_finder() == rank;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(1.0, watch.timeout()));
    while (still(!finder) && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    // Those that are stopped or stuck would keep the launcher waiting for ever.
    if (finder)
      for (const int r : local)
        if (const RankState s = watch.state(r); r != rank && s.known && !s.gone && s.pid > 1 && s.phase == Phase::running)
          kill(s.pid, SIGKILL);
    _exit(exit_code);
  }

  std::shared_ptr<MpiEngine> engine;
};

class MpiWorld final : public SharedWorld {
 public:
  explicit MpiWorld(std::shared_ptr<MpiCore> core) : SharedWorld(core, "mpi"), mpi_(std::move(core)) {}
  void end_failed(int exit_code) override {
    if (!mpi_->watch.failed()) fail_job("it ended without saying why");
    mpi_->end(exit_code);
  }

 private:
  std::shared_ptr<MpiCore> mpi_;
};

}  // namespace
}  // namespace comm

bool mpi_available() { return true; }

std::shared_ptr<World> make_mpi_world(double timeout_seconds, int ranks_per_host) {
  if (!(timeout_seconds > 0)) fail(Fault::programming, "MPI", "a rank must be waited for longer than 0 s");
  return std::make_shared<comm::MpiWorld>(
      std::make_shared<comm::MpiCore>(std::make_shared<comm::MpiEngine>(timeout_seconds, ranks_per_host), timeout_seconds));
}

std::vector<std::string> mpi_launch_arguments(double timeout_seconds) {
  // mpirun ends all ranks when one ends badly; it lets the others live for two seconds first, in which they say who it was. Only
  // words that Open MPI 4 and 5 both know: 5 refuses --quiet.
  std::vector<std::string> arguments{"--oversubscribe", "--bind-to",           "none", "--mca", "odls_base_sigkill_timeout", "2",
                                     "--mca",           "mpi_yield_when_idle", "1"};
  // Half of the time without a word, then five questions.
  const auto whole = [](double seconds) { return std::to_string(std::max(1, static_cast<int>(seconds))); };
  for (const std::string& a : {std::string("--mca"), std::string("oob_tcp_keepalive_time"), whole(timeout_seconds / 2),
                               std::string("--mca"), std::string("oob_tcp_keepalive_intvl"), whole(timeout_seconds / 10),
                               std::string("--mca"), std::string("oob_tcp_keepalive_probes"), std::string("5")})
    arguments.push_back(a);
  if (geteuid() == 0) arguments.insert(arguments.begin(), "--allow-run-as-root");
  return arguments;
}

}  // namespace capstan
