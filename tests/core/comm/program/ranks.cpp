// One rank of a job of several processes: `comm_ranks SCENARIO [ARGUMENTS]`, started by mpirun. Prints what the tests look
// for.
#include "battery.h"
#include "comm/mpi_world.h"

#include <capstan/error.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>

namespace capstan {
namespace {

std::vector<int> all(World& w) {
  std::vector<int> ranks(static_cast<std::size_t>(w.size()));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

void battery(World& w, int steps, std::int64_t largest, bool order_of_ranks) {
  for (std::uint64_t seed = 11; seed < 13; ++seed) testing::Battery(w, seed, {order_of_ranks}).run(steps, largest);
}

/// Steps of a training loop that talks; rank `bad` does `what` at step 5. "silent": it and all ranks after it stop later.
void misbehave(World& w, int bad, const std::string& what) {
  auto c = w.make("shard/reduce", all(w));
  auto pairs = w.make("pair", {w.rank() / 2 * 2, w.rank() / 2 * 2 + 1});
  std::vector<float> x(300'000, 1.0f);
  for (int step = 0; step < 100'000; ++step) {
    w.at(step, "backward of block 3");
    if (what == "silent" && w.rank() >= bad && step == 150) raise(SIGSTOP);
    if (step == 100 && w.rank() == 0) std::fprintf(stderr, "running\n");
    if (w.rank() == bad && step == 5 && what != "silent") {
      std::fprintf(stderr, "rank %d acts at %.3f\n", bad,
                   std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count());
      if (what == "kill") raise(SIGKILL);
      if (what == "stop") raise(SIGSTOP);
      if (what == "throw") fail(Fault::runtime, "optimizer", "the loss is not a number");
      if (what == "exit") _exit(0);
      if (what == "leave") return;
      if (what == "sleep") std::this_thread::sleep_for(std::chrono::seconds(3600));
      if (what == "crash") raise(SIGSEGV);
    }
    Handle h = c->all_reduce(x.data(), 300'000, DType::f32, Reduction::max);
    pairs->barrier();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    h.wait();
  }
}

/// Rank `bad` dies while nobody waits for it.
void compute(World& w, int bad) {
  auto c = w.make("all", all(w));
  c->barrier();
  w.at(7, "forward");
  if (w.rank() == bad) raise(SIGKILL);
  std::this_thread::sleep_for(std::chrono::seconds(60));
}

int run(const std::vector<std::string>& a) {
  const char* cut = std::getenv("RANKS_PER_HOST");
  auto world = make_mpi_world(std::stod(a[1]), cut ? std::atoi(cut) : 0);
  const auto number = [&](std::size_t i) { return std::stoi(a[i]); };
  try {
    if (a[0] == "battery") battery(*world, number(2), number(3), a[4] == "bits");
    else if (a[0] == "misbehave") misbehave(*world, number(2), a[3]);
    else if (a[0] == "compute") compute(*world, number(2));
    else fail(Fault::input, "ranks", "unknown scenario " + a[0]);
    std::printf("rank %d of %d, local %d of %d: %s passed\n", world->rank(), world->size(), world->local_rank(),
                world->local_size(), a[0].c_str());
    std::fflush(stdout);
  } catch (const std::exception& e) {
    if (world->fail_job(e.what())) std::fprintf(stderr, "error: %s\n", e.what());
    world->end_failed(3);
  }
  return 0;
}

}  // namespace
}  // namespace capstan

int main(int argc, char** argv) { return capstan::run({argv + 1, argv + argc}); }
