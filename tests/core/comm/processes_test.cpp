// Ranks that are processes, started by mpirun: the collectives, and who is named when one of them does not come.
#include "comm/mpi_world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <string>
#include <sys/wait.h>

namespace capstan {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct Job { int code = -1; std::string out; double seconds = 0; };

Job run_ranks(int ranks, const std::string& arguments) {
  std::string command = "timeout -k 1 100 mpirun -np " + std::to_string(ranks);
  for (const std::string& a : mpi_launch_arguments()) command += " " + a;
  command += std::string(" ") + CAPSTAN_COMM_RANKS + " " + arguments + " 2>&1";
  Job job;
  const auto start = std::chrono::steady_clock::now();
  std::FILE* pipe = popen(command.c_str(), "r");
  std::array<char, 4096> line;
  while (pipe && std::fgets(line.data(), line.size(), pipe)) job.out += line.data();
  const int status = pipe ? pclose(pipe) : -1;
  job.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  job.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return job;
}

int count(const std::string& text, const std::string& what) {
  int n = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

class Processes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Processes, ::testing::Values(1, 2, 4));

TEST_P(Processes, RandomCollectivesGiveTheBitsOfPlainLoops) {
  const Job job = run_ranks(GetParam(), "battery 30 100 300000 0");
  EXPECT_EQ(job.code, 0) << job.out;
  EXPECT_EQ(count(job.out, "battery passed"), GetParam()) << job.out;
}

/// A rank that does this at step 5, and what is said of it.
struct Mishap { const char* what; const char* said; };

class Watchdog : public ::testing::TestWithParam<Mishap> {};
INSTANTIATE_TEST_SUITE_P(Mishaps, Watchdog,
                         ::testing::Values(Mishap{"kill", "is gone (killed or crashed)"}, Mishap{"stop", "is stopped (SIGSTOP or a debugger)"},
                                           Mishap{"throw", "the loss is not a number"}, Mishap{"exit", "is gone (killed or crashed)"},
                                           Mishap{"leave", "it has left the job"}, Mishap{"sleep", "it is running but did not come"}),
                         [](const auto& info) { return info.param.what; });

TEST_P(Watchdog, OneMessageNamesTheRankItsStepAndTheCollective) {
  const int bad = 2;
  const Job job = run_ranks(4, "misbehave 2 " + std::to_string(bad) + " " + GetParam().what);
  EXPECT_NE(job.code, 0) << job.out;
  EXPECT_NE(job.code, 124) << "hung: " << job.out;
  EXPECT_LT(job.seconds, 25);  // 2 s of timeout, mpirun's own 2 s twice, and a loaded machine
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr(GetParam().said));
  if (std::string(GetParam().what) == "throw") return;  // it speaks for itself
  EXPECT_THAT(job.out, HasSubstr("error: [rank 2] rank 2 (step 5, backward of block 3)"));
  EXPECT_THAT(job.out, ::testing::ContainsRegex("expected in (all_reduce|barrier) 6 of communicator '(shard/reduce|pair)'"));
}

TEST(WatchdogDetail, ADeathIsNoticedWhileEverybodyComputes) {
  const Job job = run_ranks(3, "compute 2 1");
  EXPECT_NE(job.code, 0) << job.out;
  EXPECT_LT(job.seconds, 25);
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr("rank 1 (step 7, forward): its process"));
}

}  // namespace
}  // namespace capstan
