// Ranks that are processes of one host without MPI, as torchrun starts them: they meet, compute together, and name who is
// missing.
#include "launch/shared_memory_world.h"
#include "comm/failure.h"
#include "forked.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <numeric>
#include <vector>

namespace capstan::launch {
namespace {

using capstan::testing::Forked;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using Ranks = std::vector<std::unique_ptr<Forked>>;

std::string meeting() {
  return "test " + std::to_string(getpid()) + " " + ::testing::UnitTest::GetInstance()->current_test_info()->name();
}

/// A rank as the program runs it: an error is told to the world, one rank prints it, all end.
/// Rank 0 waits `more` seconds longer.
Ranks start(int size, double timeout, const std::function<void(World&)>& body, int absent = -1, double more = 0) {
  Ranks ranks;
  for (int r = 0; r < size; ++r) {
    if (r == absent) continue;
    ranks.push_back(std::make_unique<Forked>([=, name = meeting()] {
      auto world = make_shared_memory_world(name, r, size, timeout + (r == 0 ? more : 0));
      try {
        body(*world);
      } catch (const std::exception& e) {
        if (world->fail_job(e.what())) std::fprintf(stderr, "said: %s\n", failure_of(*world).c_str());
        world->end_failed(5);
      }
      return 0;
    }));
  }
  return ranks;
}

void add(World& world, int times) {
  std::vector<int> all(static_cast<std::size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  auto comm = world.make("all", all);
  for (int i = 0; i < times; ++i) {
    world.at(i, "adding");
    std::vector<float> x(1000, static_cast<float>(world.rank() + i));
    comm->all_reduce(x.data(), 1000, DType::f32).wait();
    const float expected = static_cast<float>(world.size() * (world.size() - 1) / 2 + i * world.size());
    for (const float v : x)
      if (v != expected) throw std::runtime_error("a wrong sum");
  }
}

std::string all_said(Ranks& ranks) {
  std::string text;
  for (auto& rank : ranks) rank->wait(), text += rank->out();
  return text;
}

int count(const std::string& text, const std::string& what) {
  int n = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

TEST(SharedMemoryWorld, RanksMeetAndAdd) {
  for (const int size : {1, 2, 5}) {
    Ranks ranks = start(size, 20, [](World& world) { add(world, 20); });
    for (auto& rank : ranks) EXPECT_EQ(rank->wait(), 0) << rank->out();
  }
}

TEST(SharedMemoryWorld, TheNameIsFreeOnceAllHaveCome) {
  // The same name twice, one job beside the other.
  int gate[2];  // closed to the first job until its file is gone and the second has ended
  ASSERT_EQ(pipe(gate), 0);
  Ranks first = start(2, 60, [&](World& world) {
    add(world, 1);
    std::puts("all have come"), std::fflush(stdout);
    char token;
    if (read(gate[0], &token, 1) != 1) throw std::runtime_error("no token");
    add(world, 1);
  });
  for (auto& rank : first) ASSERT_TRUE(rank->read_until("all have come")) << rank->out();
  const std::filesystem::path file = shared_memory_file(meeting());
  for (const auto& entry : std::filesystem::directory_iterator(file.parent_path()))  // other tests have files there too
    EXPECT_THAT(entry.path().string(), Not(StartsWith(file.string())));
  Ranks second = start(2, 60, [](World& world) { add(world, 3); });
  for (auto& rank : second) EXPECT_EQ(rank->wait(), 0) << rank->out();
  EXPECT_EQ(write(gate[1], "12", 2), 2);
  for (auto& rank : first) EXPECT_EQ(rank->wait(), 0) << rank->out();
  EXPECT_FALSE(exists(file));
  close(gate[0]), close(gate[1]);
}

TEST(SharedMemoryWorld, WhatADeadJobLeftIsNotJoined) {
  {
    Ranks dead = start(
        2, 20, [](World&) {}, 1);  // rank 1 never comes; rank 0 has laid out the memory by then
    while (!std::filesystem::exists(shared_memory_file(meeting()))) usleep(1000);
    kill(dead[0]->pid(), SIGKILL);
    dead[0]->wait();
  }
  std::vector<std::unique_ptr<Forked>> late;
  const std::string name = meeting();
  for (const int r : {1, 0}) {  // rank 1 looks first and finds the dead job's memory
    late.push_back(std::make_unique<Forked>([=] {
      auto world = make_shared_memory_world(name, r, 2, 20);
      add(*world, 3);
      return 0;
    }));
    usleep(200000);
  }
  for (auto& rank : late) EXPECT_EQ(rank->wait(), 0) << rank->out();
}

TEST(SharedMemoryWorld, ARankThatDoesNotComeIsNamed) {
  Ranks without_last = start(
      3, 1, [](World& world) { add(world, 1); }, 2);
  EXPECT_THAT(all_said(without_last), HasSubstr("rank 2 did not come"));
  Ranks without_first = start(
      2, 1, [](World& world) { add(world, 1); }, 0);
  EXPECT_THAT(all_said(without_first), HasSubstr("rank 0 did not come"));
}

// Rank 1 gives up first, on rank 0, which waits for rank 2 to start.
TEST(SharedMemoryWorld, WhoWaitsForTheStartIsNotBlamed) {
  Ranks ranks = start(
      3, 1, [](World& world) { add(world, 1); }, 2, 0.3);
  EXPECT_THAT(all_said(ranks), HasSubstr("rank 2 did not come"));
}

TEST(SharedMemoryWorld, TwoOfOneRankAreRefused) {
  const std::string name = meeting();
  const auto rank = [&](int r) {
    return std::make_unique<Forked>([=] {
      make_shared_memory_world(name, r, 3, 2);
      return 0;
    });
  };
  auto zero = rank(0), one = rank(1);
  usleep(300000);
  auto again = rank(1);
  EXPECT_NE(again->wait(), 0);
  EXPECT_THAT(again->out(), HasSubstr("there is a rank 1"));
  EXPECT_NE(zero->wait(), 0);  // rank 2 never came
  one->wait();
}

struct Mishap {
  const char* name;
  void (*happens)();
  const char* said;
};

class Mishaps : public ::testing::TestWithParam<Mishap> {};
INSTANTIATE_TEST_SUITE_P(SharedMemoryWorld, Mishaps,
                         ::testing::Values(Mishap{"killed", [] { raise(SIGKILL); }, "is gone (killed or crashed)"},
                                           Mishap{"stopped", [] { raise(SIGSTOP); }, "is stopped"},
                                           Mishap{"thrown", [] { throw std::runtime_error("no more beans"); },
                                                  "no more beans"}),
                         [](const auto& info) { return info.param.name; });

TEST_P(Mishaps, EndTheJobInTimeWithOneMessage) {
  const auto begin = std::chrono::steady_clock::now();
  Ranks ranks = start(4, 2, [happens = GetParam().happens](World& world) {
    add(world, 3);
    world.at(7, "backward");
    if (world.rank() == 2) happens();
    add(world, 1);
  });
  const std::string text = all_said(ranks);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_LT(seconds, 2 + 6);
  EXPECT_EQ(count(text, "said: "), 1) << text;
  EXPECT_THAT(text, AllOf(HasSubstr("rank 2"), HasSubstr("step 7"), HasSubstr(GetParam().said),
                          HasSubstr("all_reduce 1 of communicator 'all'")));
}

}  // namespace
}  // namespace capstan::launch
