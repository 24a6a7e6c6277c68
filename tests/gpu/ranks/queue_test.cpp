// Steps of several ranks that are asked for ahead of their results: the bits of those that the hosts wait for, no wait of a host
// over NCCL, and a gradient that is bad on one rank held back on all. Recorded ones: the bits of those that are not, and all ranks
// record and replay alike.
#include "base/cuda_device.h"
#include "core/invariance/support.h"
#include "gpu/ranks/case.h"

#include <capstan/batch.h>
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <filesystem>
#include <functional>
#include <limits>

namespace capstan::invariance {
namespace {

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto both = [&](Layout layout, const char* form, const char* type, std::vector<std::string> more = {}, std::string name = "") {
    for (const char* way : {"staged", "nccl"}) all.push_back({layout, form, type, way, more, name});
  };
  const auto nccl = [&](Layout layout, const char* form, const char* type, std::vector<std::string> more = {}, std::string name = "") {
    all.push_back({layout, form, type, "nccl", more, name});
  };
  both({1, 1, 2, 1, 1}, "llama", "f32");
  nccl({1, 2, 2, 1, 1}, "odd", "f32");
  nccl({1, 1, 2, 1, 1, "zero1"}, "gpt2", "bf16", {"mesh.reduce=bf16"}, "narrow");
  nccl({1, 1, 2, 1, 1}, "gpt2", "bf16", {"mesh.reduce=bf16"}, "narrow");
  both({2, 1, 1, 1, 1}, "odd", "f32", {"mesh.pipeline.schedule=zero_bubble"}, "zero_bubble");
  nccl({1, 1, 1, 2, 1}, "llama", "f32");
  nccl({1, 1, 1, 1, 2}, "odd", "f32");
  nccl({1, 1, 1, 1, 2}, "gpt2", "bf16");
  both({1, 1, 2, 1, 1}, "llama", "f32", {"optimizer={plugin: muon, lr: 0.01}"}, "muon");
  return all;
}

/// How often the calling thread has waited for the GPU, where that is the emulated one; null elsewhere.
using Waits = long (*)();
Waits waits() {
  Dl_info core{};
  dladdr(reinterpret_cast<const void*>(&cuda_device_count), &core);
  const auto path = std::filesystem::path(core.dli_fname).parent_path() / "libcapstan_cuda.so";
  void* const cuda = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  return cuda == nullptr ? nullptr : reinterpret_cast<Waits>(dlsym(cuda, "emulated_gpu_waits"));
}

class QueuedOnGpus : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (GetParam().way == "nccl" && GetParam().layout.world() > cuda_device_count()) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  }
};

TEST_P(QueuedOnGpus, StepsHaveTheBitsOfThoseThatAreWaitedFor) {
  const Case& c = GetParam();
  const Trained plain = train_on(c.layout, words_of(c), 3);
  const Waits count = waits();
  std::vector<long> before(static_cast<std::size_t>(c.layout.world())), during = before;
  std::vector<std::string> words = words_of(c);
  words.push_back("run.cuda_graphs=off");  // recorded ones are below
  const Trained queued = train_queued_on(c.layout, words, 3, [&](int rank, int step, bool after) {
    if (count == nullptr || step < 2) return;  // the first makes links and plans
    const auto r = static_cast<std::size_t>(rank);
    if (after) during[r] += count() - before[r];
    else before[r] = count();
  });
  EXPECT_EQ(queued.losses, plain.losses);
  EXPECT_EQ(queued.norms, plain.norms);
  EXPECT_EQ(queued.last, plain.last);
  EXPECT_NE(queued.last, queued.initial);
  if (c.way == "staged") return;  // hosts wait in each collective
  for (const long n : during) EXPECT_EQ(n, 0) << "a host waited for its GPU while it asked for a step";
}

INSTANTIATE_TEST_SUITE_P(Layouts, QueuedOnGpus, ::testing::ValuesIn(cases()), [](const auto& info) {
  const Case& c = info.param;
  return c.layout.name() + "_" + c.form + "_" + c.type + (c.name.empty() ? "" : "_" + c.name) + "_" + c.way;
});

using Weights = std::map<std::string, std::vector<char>>;

Weights weights_of(const Engine& engine) {
  Weights all;
  for (const NamedTensor& t : engine.tensors(true)) {
    std::vector<char> bytes(static_cast<std::size_t>(t.value.bytes()));
    t.value.copy_to_host(bytes.data(), t.value.bytes());
    all.emplace(t.name, std::move(bytes));
  }
  return all;
}

/// Step 3's weight of one token is NaN on one rank: also on the other replica, which shares no gradient of it, nothing changes
/// until the gate opens.
TEST(QueuedOnGpusToo, WhatIsBadOnOneRankIsHeldBackOnAll) {
  for (const char* way : {"staged", "nccl"})
    for (const Layout& layout : {Layout{1, 1, 2, 1, 1}, Layout{1, 2, 1, 1, 1}, Layout{1, 2, 2, 1, 1}}) {
      if (std::string(way) == "nccl" && layout.world() > cuda_device_count()) continue;
      SCOPED_TRACE(layout.name() + " " + way);
      on_ranks(layout, words_of({layout, "llama", "f32", way}), [](train::Session& session) {
        Engine& engine = *session.engine;
        engine.attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
        engine.initialize();
        const auto ask = [&](std::int64_t step, bool bad) {
          std::vector<std::int32_t> tokens, targets;
          std::vector<float> weight(24, 1);
          for (int i = 0; i < 24; ++i) tokens.push_back((7 * i + session.rank()) % 256), targets.push_back((5 * i + 1) % 256);
          if (bad && session.rank() == 1) weight[3] = std::numeric_limits<float>::quiet_NaN();
          std::vector<Batch> batches;
          batches.push_back(make_batch(*session.device, tokens, std::vector<std::int32_t>{24}, targets, weight, 0));
          batches[0].step_weight = 100;
          return engine.queue_step(std::span<const Batch>(batches), step, 1, 1.0);
        };
        for (std::int64_t step = 1; step <= 2; ++step) EXPECT_TRUE(engine.collect(ask(step, false)).updated);
        const Weights good = weights_of(engine);
        const QueuedStep third = ask(3, true), fourth = ask(4, false);
        EXPECT_FALSE(engine.collect(third).updated);
        EXPECT_FALSE(engine.collect(fourth).updated) << "what was asked for behind a bad step must not count";
        EXPECT_EQ(weights_of(engine), good);
        engine.reopen();
        engine.discard();
        EXPECT_TRUE(engine.collect(ask(3, false)).updated);
        EXPECT_NE(weights_of(engine), good);
      });
    }
}

/// A step of two microbatches of 24 rows, the first in `sequences` sequences, the other in one.
std::vector<Batch> batches_of(train::Session& session, std::int64_t step, int sequences) {
  std::vector<Batch> batches;
  for (int m = 0; m < 2; ++m) {
    std::vector<std::int32_t> tokens, targets;
    for (int i = 0; i < 24; ++i) {
      tokens.push_back(static_cast<std::int32_t>((7 * i + 31 * step + 3 * m + session.mesh->data_rank()) % 256));
      targets.push_back(static_cast<std::int32_t>((5 * i + 11 * step + m) % 256));
    }
    const int n = m == 0 ? sequences : 1;
    const std::vector<std::int32_t> lengths(static_cast<std::size_t>(n), 24 / n);
    batches.push_back(make_batch(*session.device, tokens, lengths, targets, {}, (step * 2 + m) * 24));
    batches.back().step_weight = 48 * session.mesh->data_ranks();
  }
  return batches;
}

struct Recorded {
  Weights weights;
  std::int64_t records = 0;
  std::string why_not;
  std::int64_t differing = 0;
  long waits = 0;
};

/// `steps` steps on each rank. `sequences`: of a rank's first batch in a step; `prepare`: before the first.
std::vector<Recorded> train_recorded(const Case& c, const std::string& graphs, std::int64_t steps,
                                     const std::function<int(int rank, std::int64_t step)>& sequences,
                                     const std::function<void(train::Session&)>& prepare = {}) {
  std::vector<Recorded> ranks(static_cast<std::size_t>(c.layout.world()));
  std::vector<std::string> words = words_of(c);
  words.push_back("run.cuda_graphs=" + graphs);
  on_ranks(c.layout, words, [&](train::Session& session) {
    Recorded& mine = ranks[static_cast<std::size_t>(session.rank())];
    Engine& engine = *session.engine;
    engine.attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
    engine.initialize();
    if (prepare) prepare(session);
    const Waits count = waits();
    std::deque<QueuedStep> ahead;
    for (std::int64_t step = 1; step <= steps; ++step) {
      const std::vector<Batch> batches = batches_of(session, step, sequences(session.mesh->data_rank(), step));
      const long before = count == nullptr ? 0 : count();
      ahead.push_back(engine.queue_step(std::span<const Batch>(batches), step, 1, 0.5));
      if (step > 2 && count != nullptr) mine.waits += count() - before;
      if (ahead.size() < 2) continue;
      EXPECT_TRUE(engine.collect(ahead.front()).updated);
      ahead.pop_front();
    }
    EXPECT_TRUE(engine.collect(ahead.front()).updated);
    mine.weights = weights_of(engine), mine.records = engine.queued()->recorded(), mine.why_not = engine.queued()->why_not(), mine.differing = engine.queued()->differing();
  });
  return ranks;
}

class RecordedOnGpus : public QueuedOnGpus {};

int one(int, std::int64_t) { return 1; }

TEST_P(RecordedOnGpus, StepsHaveTheBitsOfUnrecordedOnes) {
  const auto plain = train_recorded(GetParam(), "off", 4, one), recorded = train_recorded(GetParam(), "on", 4, one);
  for (std::size_t r = 0; r < plain.size(); ++r) {
    EXPECT_EQ(recorded[r].weights, plain[r].weights);
    EXPECT_EQ(plain[r].records, 0);
    EXPECT_EQ(recorded[r].records, 2) << "the first microbatch of a step, and the other one";
    EXPECT_EQ(recorded[r].waits, 0) << "a host waited for its GPU while it asked for a step";
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, RecordedOnGpus,
                         ::testing::Values(Case{{1, 1, 2, 1, 1}, "llama", "f32", "nccl"}, Case{{1, 1, 2, 1, 1}, "gpt2", "bf16", "nccl", {"mesh.reduce=bf16", "precision.linear=fp8"}, "narrow_fp8"},
                                           Case{{1, 1, 2, 1, 1}, "llama", "f32", "nccl", {"train.recompute=block"}, "recompute"},
                                           Case{{1, 1, 2, 1, 1, "zero1"}, "gpt2", "f32", "nccl"}, Case{{1, 1, 2, 1, 1, "ddp"}, "llama", "f32", "nccl"}, Case{{1, 2, 1, 1, 1}, "odd", "f32", "nccl"},
                                           Case{{1, 1, 1, 1, 2}, "gpt2", "bf16", "nccl"}, Case{{1, 1, 2, 1, 2}, "llama", "f32", "nccl"}),
                         [](const auto& info) {
                           const Case& c = info.param;
                           return c.layout.name() + "_" + c.form + "_" + c.type + (c.name.empty() ? "" : "_" + c.name);
                         });

class RecordedOnGpusToo : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  }
  const Case c{{1, 1, 2, 1, 1}, "llama", "f32", "nccl"};
};

// Step 2 would record, step 4 replay: one rank has another kind in both. In step 5 a new kind is ahead of one that is replayed, and
// its reductions are under way.
TEST_F(RecordedOnGpusToo, KindsThatDifferBetweenRanksRunUnrecorded) {
  const auto mixed = [](int rank, std::int64_t step) { return step == 5 ? 3 : rank == 1 && (step == 2 || step == 4) ? 2 : 1; };
  const auto plain = train_recorded(c, "off", 6, mixed), recorded = train_recorded(c, "auto", 6, mixed);
  for (std::size_t r = 0; r < plain.size(); ++r) {
    EXPECT_EQ(recorded[r].weights, plain[r].weights);
    EXPECT_EQ(recorded[r].records, 2);
    EXPECT_EQ(recorded[r].why_not, "");
    EXPECT_EQ(recorded[r].differing, 2);
  }
  std::vector<std::string> words = words_of(c);
  words.push_back("run.cuda_graphs=on");
  on_ranks(c.layout, words, [](train::Session& session) {
    session.engine->attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
    session.engine->initialize();
    const std::vector<Batch> batches = batches_of(session, 1, session.rank() + 1);
    try {
      session.engine->queue_step(std::span<const Batch>(batches), 1, 1, 0);
      ADD_FAILURE() << "a step that cannot be recorded went through";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), ::testing::AllOf(::testing::HasSubstr("run.cuda_graphs"), ::testing::HasSubstr("batches of different kinds")));
    }
  });
}

// A wait for the GPU in one rank's backward cannot be recorded.
TEST_F(RecordedOnGpusToo, WhatOneRankCannotRecordNoneDoes) {
  const auto wait_on_one = [](train::Session& session) {
    if (session.rank() == 1) session.model->parameters().back()->leaf()->hook = [&session](Leaf&) { session.device->synchronize(); };
  };
  const auto plain = train_recorded(c, "off", 4, one, wait_on_one), tried = train_recorded(c, "auto", 4, one, wait_on_one);
  for (std::size_t r = 0; r < plain.size(); ++r) {
    EXPECT_EQ(tried[r].weights, plain[r].weights);
    EXPECT_EQ(tried[r].records, 0);
  }
  EXPECT_THAT(tried[0].why_not, ::testing::HasSubstr("another rank"));
  EXPECT_THAT(tried[1].why_not, ::testing::HasSubstr("waiting for the GPU"));
}

TEST_F(RecordedOnGpusToo, StagedRanksAndPipelinesAreNot) {
  for (const auto& [other, word] : {std::pair{Case{{1, 1, 2, 1, 1}, "llama", "f32", "staged"}, "through host memory"}, std::pair{Case{{2, 1, 1, 1, 1}, "llama", "f32", "nccl"}, "mesh.pp"},
                                    std::pair{Case{{1, 1, 1, 2, 1}, "llama", "f32", "nccl"}, "mesh.context"}})
    on_ranks(other.layout, words_of(other), [word = word](train::Session& session) {
      session.engine->attach(session.host->make_as<Optimizer>(session.options().plugin("optimizer")));
      EXPECT_THAT(session.engine->cannot_record(), ::testing::HasSubstr(word));
    });
}

}  // namespace
}  // namespace capstan::invariance
