// Launch: what launchers leave in the environment, and whether they agree.
#include "launch/launch.h"

#include "comm/mpi_world.h"
#include "launch/shared_memory_world.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string_view>
#include <thread>
#include <vector>

namespace capstan::launch {
namespace {

constexpr const char* where = "launch";
constexpr int most_ranks = 1 << 24;

/// Reads one launcher's variables, and keeps what it read for messages.
class Reader {
 public:
  Reader(const Environment& environment, std::string launcher) : environment_(environment) {
    source_.launcher = std::move(launcher);
  }

  bool has(const std::string& name) const { return environment_(name).has_value(); }
  /// Error(input) unless it is a number from `least`; -1 when it is not set.
  int number(const std::string& name, int least) {
    const auto text = environment_(name);
    if (!text) return -1;
    int value = 0;
    const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
    if (error != std::errc() || end != text->data() + text->size() || value < least || value > most_ranks)
      fail(Fault::input, where, fmt::format("{}={}: expected a number from {}", name, *text, least));
    source_.variables += fmt::format("{}{}={}", source_.variables.empty() ? "" : ", ", name, *text);
    return value;
  }
  /// rank and size, both or none; Error(input) for half of it.
  bool rank_and_size(const std::string& rank, const std::string& size) {
    source_.rank = number(rank, 0);
    source_.size = number(size, 1);
    if ((source_.rank < 0) != (source_.size < 0))
      fail(Fault::input, where,
           fmt::format("{} is set but {} is not: expected both from {}, or neither", source_.rank < 0 ? size : rank,
                       source_.rank < 0 ? rank : size, source_.launcher));
    return source_.rank >= 0;
  }
  LaunchSource& source() { return source_; }

 private:
  const Environment& environment_;
  LaunchSource source_;
};

void check_possible(const LaunchSource& s) {
  if (s.rank >= s.size && s.rank >= 0)
    fail(Fault::input, where,
         fmt::format("{}: rank {} of {} ranks; expected 0 to {}", s.variables, s.rank, s.size, s.size - 1));
  if (s.local_size > s.size)
    fail(Fault::input, where, fmt::format("{}: {} ranks on this host, but {} in all", s.variables, s.local_size, s.size));
  if (s.local_size > 0 && s.local_rank >= s.local_size)
    fail(Fault::input, where,
         fmt::format("{}: rank {} of {} on this host; expected 0 to {}", s.variables, s.local_rank, s.local_size,
                     s.local_size - 1));
}

/// A job script has the variables of a rank 0 of all tasks, and is none of them: only what srun starts is in a step.
bool is_job_script(const Environment& environment) {
  return environment("SLURM_JOB_ID") && !environment("SLURM_STEP_ID") && !environment("SLURM_STEPID");
}

/// Every launcher that speaks, the one that is to be followed first.
std::vector<LaunchSource> sources(const Environment& environment) {
  std::vector<LaunchSource> all;
  Reader mpirun(environment, "mpirun");
  if (mpirun.rank_and_size("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")) {
    mpirun.source().local_rank = mpirun.number("OMPI_COMM_WORLD_LOCAL_RANK", 0);
    mpirun.source().local_size = mpirun.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1);
    all.push_back(mpirun.source());
  }
  Reader pmi(environment, "PMI");
  if (pmi.rank_and_size("PMI_RANK", "PMI_SIZE")) all.push_back(pmi.source());
  // mpirun inside an allocation leaves the variables of the task around it, which is not this process.
  const auto task = environment("SLURM_TASK_PID");
  const bool around = mpirun.has("OMPI_COMM_WORLD_RANK") && task && *task != std::to_string(getpid());
  Reader slurm(environment, "srun");
  if (slurm.has("SLURM_PROCID") && !around && !is_job_script(environment)) {
    const bool step = slurm.has("SLURM_STEP_NUM_TASKS");
    if (slurm.rank_and_size("SLURM_PROCID", step ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS")) {
      slurm.source().local_rank = slurm.number("SLURM_LOCALID", 0);
      all.push_back(slurm.source());
    }
  }
  Reader torchrun(environment, "torchrun");
  if (torchrun.has("RANK") || torchrun.has("WORLD_SIZE")) {
    torchrun.rank_and_size("RANK", "WORLD_SIZE");
    torchrun.source().local_rank = torchrun.number("LOCAL_RANK", 0);
    torchrun.source().local_size = torchrun.number("LOCAL_WORLD_SIZE", 1);
    all.push_back(torchrun.source());
  }
  for (const LaunchSource& s : all) check_possible(s);
  return all;
}

void check_agreement(const LaunchSource& a, const LaunchSource& b) {
  const auto compare = [&](const char* what, int x, int y) {
    if (x < 0 || y < 0 || x == y) return;
    fail(Fault::input, where,
         fmt::format("{} says {} {} ({}), {} says {} ({}): start the job with one of them, or unset the other's variables",
                     a.launcher, what, x, a.variables, b.launcher, y, b.variables));
  };
  compare("rank", a.rank, b.rank);
  compare("number of ranks", a.size, b.size);
  compare("rank on this host", a.local_rank, b.local_rank);
  compare("number of ranks on this host", a.local_size, b.local_size);
}

/// The name under which the ranks of a torchrun job on one host meet. Error(input) when it cannot be that.
std::string meeting_of(const LaunchSource& s, const Environment& environment) {
  const int on_host = s.local_size > 0 ? s.local_size : s.local_rank == s.rank ? s.size : 0;
  if (on_host != s.size || (s.local_rank >= 0 && s.local_rank != s.rank))
    fail(Fault::input, where,
         fmt::format("{}: the ranks are spread over hosts. Across hosts they reach each other by MPI, which torchrun does "
                     "not start: use "
                     "`srun --mpi=pmix capstan train RECIPE`, or `mpirun -np {} --host ... capstan train RECIPE`",
                     s.variables, s.size));
  const auto address = environment("MASTER_ADDR"), port = environment("MASTER_PORT");
  if (!address || !port || address->empty() || port->empty())
    fail(Fault::input, where,
         fmt::format("{}: MASTER_ADDR and MASTER_PORT tell this job from others and {} not set; torchrun sets both",
                     s.variables, address || port ? "one is" : "they are"));
  int number = 0;
  const auto [end, error] = std::from_chars(port->data(), port->data() + port->size(), number);
  if (error != std::errc() || end != port->data() + port->size() || number < 1 || number > 65535)
    fail(Fault::input, where, fmt::format("MASTER_PORT={}: expected a port, 1 to 65535", *port));
  std::string name = fmt::format("{}:{}", *address, number);
  // A job that torchrun starts again must not meet what the one before left.
  for (const char* part : {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"})
    if (const auto value = environment(part)) name += ":" + *value;
  return name;
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    if (!value) return std::nullopt;
    return value;
  };
}

Launch Launch::detect(std::optional<int> ranks, const Environment& environment) {
  if (ranks && (*ranks < 1 || *ranks > most_ranks))
    fail(Fault::input, where, fmt::format("--ranks {}: expected a number from 1", *ranks));
  std::vector<LaunchSource> all = sources(environment);
  if (all.empty()) {
    // To go on alone in an allocation of several tasks would not be what was asked for.
    const auto tasks = environment("SLURM_NTASKS");
    if (!ranks && tasks && environment("SLURM_PROCID") && *tasks != "1")
      fail(Fault::input, where,
           fmt::format("SLURM_NTASKS={}, but this is the job script and not one of its tasks: start it with srun, mpirun or "
                       "--ranks N",
                       *tasks));
    Launch l;
    if (!ranks) {
      l.by.launcher = "itself";
      return l;
    }
    l.by.launcher = "--ranks", l.by.variables = fmt::format("--ranks {}", *ranks);
    l.size = *ranks;
    l.bootstrap = l.size > 1 ? Bootstrap::spawn : Bootstrap::single;
    return l;
  }
  for (std::size_t i = 0; i < all.size(); ++i)
    for (std::size_t k = 0; k < i; ++k) check_agreement(all[k], all[i]);
  if (ranks) check_agreement({"--ranks", -1, *ranks, -1, -1, fmt::format("--ranks {}", *ranks)}, all.front());

  Launch l;
  l.by = all.front();
  l.rank = l.by.rank, l.size = l.by.size;
  for (const LaunchSource& s : all) {
    l.local_rank = std::max(l.local_rank, s.local_rank);
    l.local_size = std::max(l.local_size, s.local_size);
  }
  if (l.size == 1) return l;
  l.bootstrap = l.by.launcher == "torchrun" ? Bootstrap::shared : Bootstrap::mpi;
  if (l.bootstrap == Bootstrap::shared) {
    l.meeting = meeting_of(l.by, environment);
    l.local_rank = l.rank, l.local_size = l.size;
  }
  return l;
}

std::string Launch::describe() const {
  const std::string count = size == 1 ? "1 rank" : fmt::format("{} ranks", size);
  return fmt::format("{}, started by {}{}", count, by.launcher, by.variables.empty() ? "" : " (" + by.variables + ")");
}

std::shared_ptr<World> Launch::make_world(double timeout_seconds) const {
  switch (bootstrap) {
    case Bootstrap::single:
      return make_single_world();
    case Bootstrap::spawn:
      fail(Fault::programming, where, "a process that starts ranks is no rank itself");
    case Bootstrap::shared:
      return make_shared_memory_world(meeting, rank, size, timeout_seconds);
    case Bootstrap::mpi:
      break;
  }
  if (!mpi_available())
    fail(Fault::input, where,
         fmt::format("{}, but this build has no MPI: install libopenmpi-dev and build again, or train on one rank",
                     describe()));
  std::shared_ptr<World> world = make_mpi_world(timeout_seconds);
  if (world->size() != size || world->rank() != rank)
    fail(Fault::input, where,
         fmt::format("MPI says rank {} of {}, {} says rank {} of {} ({}): the launcher must speak this MPI's language; with "
                     "Slurm: srun --mpi=pmix",
                     world->rank(), world->size(), by.launcher, rank, size, by.variables));
  return world;
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

int threads_of_rank(int asked, int local_size) {
  return asked > 0 ? asked : std::max(1, usable_cores() / std::max(1, local_size));
}

}  // namespace capstan::launch
