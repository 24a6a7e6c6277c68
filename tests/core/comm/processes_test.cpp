// Ranks that are processes, started by mpirun: the collectives, and who is named when one of them does not come.
#include "comm/mpi_world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <string>
#include <sys/wait.h>
#include <utility>

namespace capstan {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct Job { int code = -1; std::string out; double seconds = 0; };

Job run(const std::string& command) {
  Job job;
  const auto start = std::chrono::steady_clock::now();
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::array<char, 4096> line;
  while (pipe && std::fgets(line.data(), line.size(), pipe)) job.out += line.data();
  const int status = pipe ? pclose(pipe) : -1;
  job.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  job.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return job;
}

std::string launch_arguments() {
  std::string text;
  for (const std::string& a : mpi_launch_arguments()) text += " " + a;
  return text;
}

/// `ranks_per_host` > 0: ranks of this machine count as several hosts.
Job run_ranks(int ranks, const std::string& arguments, int ranks_per_host = 0) {
  return run("RANKS_PER_HOST=" + std::to_string(ranks_per_host) + " timeout -k 1 100 mpirun -np " + std::to_string(ranks) +
             launch_arguments() + " " + CAPSTAN_COMM_RANKS + " " + arguments);
}

/// Two hosts that are network namespaces, joined by a link that can be cut.
Job run_two_hosts(int ranks_per_host, bool cut, const std::string& arguments) {
  std::string mpirun = launch_arguments();
  // Root within the namespaces, whoever this is outside.
  if (mpirun.find("--allow-run-as-root") == std::string::npos) mpirun += " --allow-run-as-root";
  return run("timeout -k 1 100 sh " + std::string(CAPSTAN_SOURCE_DIR) + "/tests/core/comm/program/two_hosts.sh " +
             std::to_string(ranks_per_host) + (cut ? " cut" : " whole") + mpirun + " " + CAPSTAN_COMM_RANKS + " " +
             arguments);
}
constexpr int kNotPermitted = 77;

int count(const std::string& text, const std::string& what) {
  int n = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

class Processes : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Processes, ::testing::Values(1, 2, 4));

TEST_P(Processes, RandomCollectivesGiveTheBitsOfPlainLoops) {
  const Job job = run_ranks(GetParam(), "battery 30 100 300000 bits");
  EXPECT_EQ(job.code, 0) << job.out;
  EXPECT_EQ(count(job.out, "battery passed"), GetParam()) << job.out;
}

/// A rank that does this at step 5, and what is said of it.
struct Mishap { const char* what; const char* said; };

class Watchdog : public ::testing::TestWithParam<Mishap> {};
INSTANTIATE_TEST_SUITE_P(
    Mishaps, Watchdog,
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
  if (std::string(GetParam().what) == "throw") return;  // it speaks for itself, in its own words
  EXPECT_THAT(job.out, HasSubstr("error: [rank 2] rank 2 (step 5, backward of block 3)"));
  EXPECT_THAT(job.out, ::testing::ContainsRegex("expected in (all_reduce|barrier) 6 of communicator '(shard/reduce|pair)'"));
}

TEST(WatchdogDetail, ADeathIsNoticedWhileEverybodyComputes) {
  const Job job = run_ranks(3, "compute 2 1");
  EXPECT_NE(job.code, 0) << job.out;
  EXPECT_LT(job.seconds, 25);
  // Open MPI 5 ends the others at once, before they look, and names the rank itself.
  if (job.out.find("prterun noticed that process rank 1 ") != std::string::npos && count(job.out, "error: ") == 0) return;
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr("rank 1 (step 7, forward): its process"));
}

class Hosts : public ::testing::TestWithParam<std::pair<int, int>> {};
INSTANTIATE_TEST_SUITE_P(RanksAndRanksPerHost, Hosts,
                         ::testing::Values(std::pair(2, 1), std::pair(4, 2), std::pair(5, 2), std::pair(6, 1)));

TEST_P(Hosts, RandomCollectivesAcrossHostsGiveTheSumsOfPlainLoops) {
  const auto [ranks, per_host] = GetParam();
  const Job job = run_ranks(ranks, "battery 30 60 300000 near", per_host);
  EXPECT_EQ(job.code, 0) << job.out;
  EXPECT_EQ(count(job.out, "battery passed"), ranks) << job.out;
}

TEST(TwoHosts, AKilledRankOfTheOtherHostIsNamedByItsOwn) {
  const Job job = run_ranks(4, "misbehave 3 3 kill", 2);
  EXPECT_NE(job.code, 0);
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr("error: [rank 3] rank 3 (step 5, backward of block 3): its process"));
}

TEST(TwoHosts, AStoppedRankOfTheOtherHostIsNamed) {
  const Job job = run_ranks(4, "misbehave 2 3 stop", 2);
  EXPECT_NE(job.code, 0);
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr("error: [rank 3] rank 3 (step 5, backward of block 3): its process"));
  EXPECT_THAT(job.out, HasSubstr("is stopped (SIGSTOP or a debugger), expected in"));
}

TEST(TwoHosts, ARankThatThrowsOnTheOtherHostEndsTheJob) {
  const Job job = run_ranks(4, "misbehave 30 3 throw", 2);
  EXPECT_EQ(job.code, 3) << job.out;
  EXPECT_LT(job.seconds, 25);
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(job.out, HasSubstr("the loss is not a number"));
}

TEST(TwoHosts, AHostThatFallsSilentIsNamedWithWhatItsRanksDidLast) {
  const Job job = run_ranks(4, "misbehave 3 2 silent", 2);
  EXPECT_NE(job.code, 0);
  EXPECT_LT(job.seconds, 30);
  EXPECT_EQ(count(job.out, "error: "), 1) << job.out;
  EXPECT_THAT(
      job.out,
      ::testing::ContainsRegex(
          "error: .rank (2|3). rank (2|3) .step 1[0-9][0-9], backward of block 3.: its host was not heard from for"));
  EXPECT_THAT(job.out, ::testing::ContainsRegex("expected in [a-z_]+ 15[0-9] of communicator 'shard/reduce'"));
}

TEST(TwoHosts, OverTcpBetweenNetworkNamespacesAndWithTheLinkCut) {
  const Job whole = run_two_hosts(2, false, "battery 30 60 300000 near");
  if (whole.code == kNotPermitted) {
    // The other tests of hosts, whose messages go through MPI's shared memory, stand for it.
    std::printf("network namespaces are not permitted here: hosts were ranks of one machine taken apart; no link was cut\n");
    return;
  }
  std::printf("two hosts as network namespaces, messages over TCP, the link cut\n");
  EXPECT_EQ(whole.code, 0) << whole.out;
  EXPECT_EQ(count(whole.out, "battery passed"), 4) << whole.out;
  EXPECT_EQ(count(whole.out, "of 4, local 1 of 2"), 2) << whole.out;  // two hosts of two ranks

  const Job cut = run_two_hosts(2, true, "misbehave 3 99 none");
  EXPECT_THAT(cut.out, HasSubstr("two_hosts: the link is cut"));
  EXPECT_THAT(cut.out, HasSubstr("two_hosts: all ranks have ended"));
  // The other host's message cannot come through the cut link.
  EXPECT_EQ(count(cut.out, "error: "), 1) << cut.out;
  EXPECT_THAT(cut.out,
              ::testing::ContainsRegex(
                  "error: .rank (2|3). rank (2|3) .step [0-9]+, backward of block 3.: its host was not heard from for"));
  EXPECT_THAT(cut.out, ::testing::ContainsRegex(
                           "the host or the link to it is down, expected in [a-z_]+ [0-9]+ of communicator 'shard/reduce'"));
}

}  // namespace
}  // namespace capstan
