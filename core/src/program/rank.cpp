// One rank: its world, its trainer, and one message when the job fails.
#include "program/rank.h"

#include "comm/failure.h"
#include "launch/record.h"
#include "launch/supervise.h"
#include "program/ending.h"
#include "recipe/run_schema.h"
#include "train/trainer.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>

namespace capstan::program {
namespace {

using launch::Record;

// A signal handler can reach nothing but a static: it holds the last signal's number.
volatile std::sig_atomic_t pending_signal = 0;

extern "C" void on_signal(int number) {
  // What a supervisor sends through mpirun, which would take the real ones for itself.
  pending_signal = number == SIGUSR1 ? SIGINT : number == SIGUSR2 ? SIGTERM : number;
  std::signal(SIGINT, SIG_DFL);  // a second one, of either kind, ends the program at once
  std::signal(SIGTERM, SIG_DFL);
}

void write_record(const Record& record) {
  const std::string line = record.line();
  std::fflush(stdout);
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fflush(stderr);
}

/// What of a recipe is wanted before there is a world to make a session in.
struct Early {
  double timeout = 60;        // mesh.timeout_seconds
  bool may_use_nccl = false;
};
Early early_of(const RankWork& work) {
  PluginHost host(work.executable);
  const Recipe recipe = load_recipe(work.recipe, work.overrides, run_schema(), host);
  const Options& mesh = recipe.options.group("mesh");
  return {mesh.number("timeout_seconds"), recipe.options.group("run").text("device") != "cpu" && mesh.text("gpu_communication") != "staged"};
}

/// mpirun gives each rank a terminal of its own, which has no width. `columns`: what it should be, 0: nobody knows, and
/// what comes out may well be a file.
void set_columns(int columns) {
  winsize size{};
  if (isatty(STDOUT_FILENO) != 1 || ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col > 0) return;
  if (columns <= 0) {
    setenv("TERM", "dumb", 1);
    return;
  }
  size.ws_col = static_cast<unsigned short>(std::min(columns, 4096));
  ioctl(STDOUT_FILENO, TIOCSWINSZ, &size);
}

void say(const RankWork& work, int rank, const Ending& ending) {
  if (work.supervised)
    write_record({Record::Event::failed, rank, ending.code, ending.message});
  else
    fmt::print(stderr, "capstan: {}\n", ending.message);
  std::fflush(stderr);
}

int train(const launch::Launch& launch, const RankWork& work, std::shared_ptr<World> world,
          std::unique_ptr<train::Trainer>& trainer) {
  trainer = std::make_unique<train::Trainer>(
      train::open_session(work.recipe, work.overrides, work.executable, train::Placement::none, std::move(world)),
      [] { return static_cast<int>(pending_signal); });
  const bool stopped = trainer->run() != 0;
  if (work.supervised && launch.rank == 0)
    write_record({stopped ? Record::Event::stopped : Record::Event::done, 0, stopped ? 1 : 0, ""});
  return stopped ? 1 : 0;
}

int run_single(const launch::Launch& launch, const RankWork& work) {
  std::unique_ptr<train::Trainer> trainer;
  if (!work.supervised) return train(launch, work, nullptr, trainer);
  try {
    return train(launch, work, nullptr, trainer);
  } catch (...) {
    const Ending ending = ending_of(std::current_exception());
    say(work, 0, ending);
    return ending.code;
  }
}

}  // namespace

int run_rank(const launch::Launch& launch, const RankWork& work) {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  if (launch.size == 1) return run_single(launch, work);
  std::signal(SIGUSR1, on_signal);
  std::signal(SIGUSR2, on_signal);
  if (work.supervised) launch::end_with_parent();
  set_columns(work.columns);

  // A recipe that cannot be read is told by the rank that the world chooses, not by all of them.
  Early early;
  std::exception_ptr unread;
  try {
    early = early_of(work);
  } catch (...) {
    unread = std::current_exception();
  }
  // CUDA's driver otherwise loads a kernel at its first launch, which may wait until the GPU is idle: behind one of NCCL's that waits for
  // another rank, which waits for this launch. The driver has no call for it, and reads this at its start; who has set it is obeyed.
  if (early.may_use_nccl) setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  // NCCL otherwise registers the buffers of recorded collectives with the other ranks, and waits for one that could not record them.
  if (early.may_use_nccl) setenv("NCCL_GRAPH_REGISTER", "0", 0);
  std::shared_ptr<World> world;
  std::unique_ptr<train::Trainer> trainer;  // outlives what is thrown: its destructors wait for ranks that do not come
  try {
    world = launch.make_world(early.timeout);
    if (unread) std::rethrow_exception(unread);
    if (launch.rank == 0) fmt::print("{}\n", launch.describe());
    const int code = train(launch, work, world, trainer);
    trainer.reset();
    return code;
  } catch (...) {
    const Ending ending = ending_of(std::current_exception());
    if (trainer) trainer->log("ended: " + ending.message);
    if (!world) {
      say(work, launch.rank,
          {ending.code, launch.rank == 0 ? ending.message : fmt::format("[rank {}] {}", launch.rank, ending.message)});
      std::fflush(nullptr);
      _exit(ending.code);
    }
    if (world->fail_job(ending.message)) {
      // Bad input and a signal are no rank's fault; all else says which rank, at which step, and where the others expected it.
      const std::string failure = ending.code == 2 || ending.interrupted ? "" : failure_of(*world);
      say(work, launch.rank, {ending.code, failure.empty() ? ending.message : failure});
    }
    world->end_failed(ending.code);
    return ending.code;
  }
}

}  // namespace capstan::program
