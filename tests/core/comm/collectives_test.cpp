// Collectives of ranks that are threads, against plain loops.
#include "battery.h"
#include "threads.h"

#include <capstan/error.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <limits>

namespace capstan {
namespace {

using testing::Battery;
using testing::on_ranks;

class Collectives : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Collectives, ::testing::Values(1, 2, 3, 4, 8));

TEST_P(Collectives, RandomOnesOnManyCommunicatorsAtOnceGiveTheBitsOfPlainLoops) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const auto errors = on_ranks(GetParam(), 60, [&](World& w) { Battery(w, seed).run(120, 300'000); });
    for (const auto& e : errors) EXPECT_EQ(e, "") << "seed " << seed;
  }
}

TEST_P(Collectives, LargerThanTheStagingBuffers) {
  const int n = GetParam();
  const std::int64_t count = (3 << 18) + 5;
  const auto errors = on_ranks(n, 60, [&](World& w) {
    std::vector<int> ranks;
    for (int r = 0; r < n; ++r) ranks.push_back(r);
    auto c = w.make("all", ranks);
    std::vector<float> data(static_cast<std::size_t>(count)), parts(static_cast<std::size_t>(count * n));
    for (std::int64_t i = 0; i < count; ++i) data[static_cast<std::size_t>(i)] = testing::value<float>(9, w.rank(), i);
    c->all_gather(data.data(), parts.data(), count, DType::f32).wait();
    c->all_reduce(data.data(), count, DType::f32).wait();
    for (std::int64_t i = 0; i < count; ++i) {
      testing::require(data[static_cast<std::size_t>(i)] == testing::reference<float>(9, ranks, i, Reduction::sum), "sum");
      testing::require(parts[static_cast<std::size_t>(i + count * (n - 1))] == testing::value<float>(9, n - 1, i), "gather");
    }
    std::vector<float> sums(static_cast<std::size_t>(count));
    c->reduce_scatter(parts.data(), sums.data(), count, DType::f32, Reduction::max).wait();
    for (std::int64_t i = 0; i < count; ++i)
      testing::require(sums[static_cast<std::size_t>(i)] == testing::value<float>(9, w.rank(), i), "max of equal parts");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(Collectives, SharedMemoryIsReadInPlaceAndGivesTheSameBits) {
  const int n = GetParam();
  const std::int64_t count = 60'007;
  const auto errors = on_ranks(n, 60, [&](World& w) {
    std::vector<int> ranks;
    for (int r = 0; r < n; ++r) ranks.push_back(r);
    auto c = w.make("all", ranks);
    for (int turn = 0; turn < 12; ++turn) {
      auto memory = w.shared_memory(static_cast<std::size_t>(count * n * 4)),
           other = w.shared_memory(static_cast<std::size_t>(count) * 4);
      auto* x = static_cast<float*>(memory.get());
      auto* y = static_cast<float*>(other.get());
      const auto op = static_cast<std::uint64_t>(turn);
      for (std::int64_t i = 0; i < count * n; ++i) x[i] = testing::value<float>(op, w.rank(), i);
      c->reduce_scatter(x, y, count, DType::f32).wait();
      // Rewritten at once: a rank that returns early would spoil what another still reads.
      for (std::int64_t i = 0; i < count; ++i) {
        testing::require(y[i] == testing::reference<float>(op, ranks, w.rank() * count + i, Reduction::sum),
                         "reduce_scatter");
        y[i] = testing::value<float>(op + 50, w.rank(), i);
      }
      c->all_gather(y, x, count, DType::f32).wait();
      for (std::int64_t i = 0; i < count; ++i) y[i] = 0;
      for (int r = 0; r < n; ++r)
        for (std::int64_t i = 0; i < count; ++i)
          testing::require(x[r * count + i] == testing::value<float>(op + 50, r, i), "all_gather");
      for (std::int64_t i = 0; i < count; ++i) x[i] = testing::value<float>(op + 90, w.rank(), i);
      c->all_reduce(x, count, DType::f32).wait();
      for (std::int64_t i = 0; i < count; ++i) {
        testing::require(x[i] == testing::reference<float>(op + 90, ranks, i, Reduction::sum), "all_reduce");
        x[i] = -1;
      }
      if (w.rank() == 0) x[count - 1] = 7;
      c->broadcast(x, count, DType::f32, 0).wait();
      testing::require(x[count - 1] == 7, "broadcast");
    }
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, SharedMemoryIsGivenBackAndMerged) {
  on_ranks(2, 20, [](World& w) {
    if (w.rank() == 1) return;
    // 100 times more than there is, in pieces that only merging makes large again.
    for (int i = 0; i < 200; ++i) {
      auto a = w.shared_memory(300 << 20), b = w.shared_memory(200 << 20), c = w.shared_memory(100 << 20);
      static_cast<char*>(a.get())[0] = 1;
      a.reset();
      b.reset();
      auto d = w.shared_memory(500 << 20);
      EXPECT_LT(static_cast<char*>(d.get()), static_cast<char*>(c.get())) << "the freed pieces were not joined";
    }
  });
}

TEST(CollectiveDetail, BrainFloatsAreAddedInSingleAndRoundedOnce) {
  // 256 + 1 + 1: rounding after each addition would lose both ones.
  const auto errors = on_ranks(3, 20, [](World& w) {
    auto c = w.make("all", {0, 1, 2});
    bf16 x(w.rank() == 0 ? 256.0f : 1.0f);
    c->all_reduce(&x, 1, DType::bf16).wait();
    testing::require(static_cast<float>(x) == 258.0f, fmt::format("got {}", static_cast<float>(x)));
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, NotANumberSurvivesMaximumAndMinimumFromAnyRank) {
  const auto errors = on_ranks(3, 20, [](World& w) {
    auto c = w.make("all", {0, 1, 2});
    for (int bad = 0; bad < 3; ++bad)
      for (Reduction op : {Reduction::max, Reduction::min}) {
        float x = w.rank() == bad ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
        c->all_reduce(&x, 1, DType::f32, op).wait();
        testing::require(std::isnan(x), "lost");
      }
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, RanksMayUseDifferentCommunicatorsInDifferentOrder) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    auto a = w.make("a", {0, 1}), b = w.make("b", {0, 1});
    for (int i = 0; i < 200; ++i) {
      float x = 1, y = 2;
      Handle hx, hy;
      if (w.rank() == 0) hx = a->all_reduce(&x, 1, DType::f32), hx.wait(), hy = b->all_reduce(&y, 1, DType::f32);
      else hx = a->all_reduce(&x, 1, DType::f32), hy = b->all_reduce(&y, 1, DType::f32);
      hy.wait();
      hx.wait();
      testing::require(x == 2 && y == 4, "sum");
    }
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, CallsReturnBeforeTheOthersCome) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    auto c = w.make("all", {0, 1});
    std::vector<float> x(1 << 20, 1.0f);
    if (w.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    const auto start = std::chrono::steady_clock::now();
    Handle h = c->all_reduce(x.data(), 1 << 20, DType::f32);
    testing::require(!h.done() || w.rank() == 1, "done before the other came");
    testing::require(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(200), "the call blocked");
    // Progress without any further call: the thread behind it does the work.
    if (w.rank() == 0) {
      while (!h.done()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    h.wait();
    testing::require(x[12345] == 2.0f, "sum");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, DroppedHandlesWait) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    auto c = w.make("all", {0, 1});
    std::vector<std::int32_t> x(100'000, 1);
    { Handle h = c->all_reduce(x.data(), 100'000, DType::i32); }
    testing::require(x[99'999] == 2, "not waited for");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, SameNameAgainIsAnotherCommunicator) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    std::vector<std::shared_ptr<Communicator>> kept;
    for (int i = 0; i < 50; ++i) {
      auto c = w.make("again", {0, 1});
      std::int64_t x = i;
      c->all_reduce(&x, 1, DType::i64).wait();
      testing::require(x == 2 * i, "sum");
      if (i % 7 == 0) kept.push_back(c);
    }
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, LedgerCountsCallsBytesAndWaits) {
  const auto errors = on_ranks(4, 20, [](World& w) {
    auto c = w.make("all", {0, 1, 2, 3});
    std::vector<float> x(1000, 1.0f), y(4000);
    if (w.rank() == 3) std::this_thread::sleep_for(std::chrono::milliseconds(150));
    for (int i = 0; i < 3; ++i) c->all_reduce(x.data(), 1000, DType::f32).wait();
    c->all_gather(x.data(), y.data(), 1000, DType::f32).wait();
    c->barrier();
    const auto ledger = c->ledger();
    testing::require(ledger.size() == 3, "rows");
    for (const CommRecord& r : ledger) {
      if (r.collective == "all_reduce") {
        testing::require(r.calls == 3 && r.bytes == 3 * 2 * 3.0 / 4 * 4000, "all_reduce row");
        testing::require((r.waited > 0.1) == (w.rank() != 3), fmt::format("rank {} waited {}", w.rank(), r.waited));
      } else if (r.collective == "all_gather") {
        testing::require(r.calls == 1 && r.bytes == 3 * 4000, "all_gather row");
      } else {
        testing::require(r.collective == "barrier" && r.calls == 1, "barrier row");
      }
    }
    c->clear_ledger();
    testing::require(c->ledger().empty(), "cleared");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, SingleWorldCopies) {
  auto world = make_single_world();
  EXPECT_EQ(world->size(), 1);
  auto c = world->make("all", {0});
  float in[3] = {1, 2, 3}, out[3] = {};
  c->reduce_scatter(in, out, 3, DType::f32).wait();
  EXPECT_EQ(out[2], 3);
  const std::int64_t counts[] = {2};
  out[0] = 9;
  c->all_gather_v(in + 1, out, counts, DType::f32).wait();
  EXPECT_EQ(out[0], 2);
  EXPECT_EQ(out[1], 3);
  c->barrier();
  EXPECT_THROW(c->send(in, 1, DType::f32, 0), Error);
  EXPECT_THROW(world->make("two", {0, 1}), Error);
}

TEST(CollectiveDetail, BadArgumentsAreRefusedBeforeAnythingIsSent) {
  const auto errors = on_ranks(2, 20, [](World& w) {
    auto c = w.make("all", {0, 1});
    float x = 1;
    const std::int64_t three[] = {1, 1, 1};
    const auto refused = [](auto&& f) {
      try {
        f();
      } catch (const Error& e) {
        return e.fault() == Fault::programming;
      }
      return false;
    };
    testing::require(refused([&] { c->all_reduce(&x, -1, DType::f32); }), "negative count");
    testing::require(refused([&] { c->all_reduce(&x, 1, DType::f16); }), "type");
    testing::require(refused([&] { c->broadcast(&x, 1, DType::f32, 2); }), "root");
    testing::require(refused([&] { c->all_gather_v(&x, &x, three, DType::f32); }), "counts");
    testing::require(refused([&] { c->send(&x, 1, DType::f32, w.rank()); }), "self");
    testing::require(refused([&] { w.make("other", {1 - w.rank()}); }), "not a member");
    testing::require(refused([&] { w.make("order", {1, 0}); }), "order");
    c->all_reduce(&x, 1, DType::f32).wait();
    testing::require(x == 2, "still works");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(CollectiveDetail, DifferentCallsAreNamed) {
  const auto errors = on_ranks(2, 5, [](World& w) {
    auto c = w.make("both", {0, 1});
    float x[4] = {};
    if (w.rank() == 0) c->all_reduce(x, 4, DType::f32).wait();
    else c->all_reduce(x, 3, DType::f32).wait();
  });
  for (const auto& e : errors) {
    EXPECT_NE(e.find("different collectives as number 1 of communicator 'both'"), std::string::npos) << e;
    EXPECT_NE(e.find("count 4"), std::string::npos) << e;
    EXPECT_NE(e.find("count 3"), std::string::npos) << e;
  }
}

}  // namespace
}  // namespace capstan
