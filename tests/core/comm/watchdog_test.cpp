// Who is named when a rank does not come: ranks as threads.
#include "threads.h"

#include <capstan/error.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace capstan {
namespace {

using testing::on_ranks;
using ::testing::HasSubstr;
using ::testing::StartsWith;

void nap(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

TEST(Watchdog, ARankThatThrowsIsNamedByAllAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  const auto errors = on_ranks(4, 30, [](World& w) {
    auto c = w.make("shard/gather", {0, 1, 2, 3});
    float x = 1;
    for (int step = 0; step < 10; ++step) {
      w.at(step, "forward of block 7");
      if (w.rank() == 1 && step == 4) fail(Fault::runtime, "data", "shard 12 is short");
      c->all_reduce(&x, 1, DType::f32, Reduction::max).wait();
    }
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));  // not after the 30 s of the timeout
  EXPECT_EQ(errors[1], "[data] shard 12 is short");
  for (const int r : {0, 2, 3}) {
    const std::string& error = errors[static_cast<std::size_t>(r)];
    EXPECT_THAT(error, StartsWith("[rank 1] rank 1 (step 4, forward of block 7) failed: [data] shard 12 is short; it was "
                                  "expected in all_reduce 5 of "
                                  "communicator 'shard/gather' by rank "));
    EXPECT_EQ(error, errors[0]);
  }
}

TEST(Watchdog, ALateRankIsNamedAfterTheTimeout) {
  const auto errors = on_ranks(3, 1, [](World& w) {
    auto c = w.make("all", {0, 1, 2});
    w.at(3, "reading data");
    if (w.rank() == 2) nap(2.5);
    c->barrier();
  });
  for (const auto& e : errors) {
    EXPECT_THAT(e, StartsWith("[rank 2] rank 2 (step 3, reading data): it is running but did not come, expected in barrier "
                              "1 of communicator 'all'"));
    EXPECT_EQ(e, errors[0]);
  }
}

TEST(Watchdog, WhoIsHeldUpByAnotherIsNotBlamed) {
  // 0 waits for 1, which waits for 2, which waits for 3, which sleeps.
  const auto errors = on_ranks(4, 1, [](World& w) {
    auto low = w.rank() < 2 ? w.make("low", {0, 1}) : nullptr;
    auto mid = w.rank() == 1 || w.rank() == 2 ? w.make("mid", {1, 2}) : nullptr;
    auto high = w.rank() > 1 ? w.make("high", {2, 3}) : nullptr;
    float x = 0;
    w.at(w.rank(), "step of its own");
    if (w.rank() == 0) low->receive(&x, 1, DType::f32, 1).wait();
    if (w.rank() == 1) mid->all_reduce(&x, 1, DType::f32).wait(), low->send(&x, 1, DType::f32, 0).wait();
    if (w.rank() == 2) high->broadcast(&x, 1, DType::f32, 1).wait(), mid->all_reduce(&x, 1, DType::f32).wait();
    if (w.rank() == 3) nap(2.5), high->broadcast(&x, 1, DType::f32, 1).wait();
  });
  for (const auto& e : errors)
    EXPECT_THAT(e, StartsWith("[rank 3] rank 3 (step 3, step of its own): it is running but did not come, expected in "
                              "broadcast 1 of communicator 'high'"));
}

TEST(Watchdog, RanksThatWaitForEachOtherAreAllNamed) {
  const auto errors = on_ranks(2, 1, [](World& w) {
    auto a = w.make("a", {0, 1}), b = w.make("b", {0, 1});
    (w.rank() == 0 ? a : b)->barrier();
  });
  for (const auto& e : errors) {
    EXPECT_THAT(e, StartsWith("[rank 0, 1] "));
    EXPECT_THAT(e, HasSubstr("these ranks wait for each other"));
    EXPECT_THAT(e, HasSubstr("barrier 1 of communicator 'a'"));
    EXPECT_THAT(e, HasSubstr("barrier 1 of communicator 'b'"));
  }
}

TEST(Watchdog, ARankThatLeavesIsNamed) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    w.at(9, "saving");
    auto c = w.make("all", {0, 1});
    if (w.rank() == 1) return;
    c->barrier();
  });
  EXPECT_EQ(errors[1], "");
  EXPECT_THAT(
      errors[0],
      StartsWith(
          "[rank 1] rank 1 (step 9, saving): it has left the job; it was expected in barrier 1 of communicator 'all'"));
}

TEST(Watchdog, OneRankSpeaks) {
  std::atomic<int> spoken{0};
  on_ranks(4, 20, [&](World& w) {
    auto c = w.make("all", {0, 1, 2, 3});
    try {
      if (w.rank() == 2) throw std::runtime_error("bad");
      c->barrier();
    } catch (const std::exception& e) {
      spoken += w.fail_job(e.what());
      spoken += w.fail_job(e.what());
    }
  });
  EXPECT_EQ(spoken, 1);
}

TEST(Watchdog, DroppedHandlesOfAFailedJobDoNotThrow) {
  const auto errors = on_ranks(2, 1, [](World& w) {
    auto c = w.make("all", {0, 1});
    float x[2] = {};
    if (w.rank() == 1) return nap(2.0);
    { Handle h = c->all_reduce(x, 1, DType::f32); }
    c->barrier();
  });
  EXPECT_THAT(errors[0], HasSubstr("rank 1"));
}

}  // namespace
}  // namespace capstan
