// Steps of several ranks that are asked for ahead of their results: the bits of those that the hosts wait for, no wait of a host
// over NCCL, and a gradient that is bad on one rank held back on all.
#include "base/cuda_device.h"
#include "core/invariance/support.h"
#include "gpu/ranks/case.h"

#include <capstan/batch.h>
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
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
  nccl({1, 1, 2, 1, 2}, "llama", "f32");
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
  const Trained queued = train_queued_on(c.layout, words_of(c), 3, [&](int rank, int step, bool after) {
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

}  // namespace
}  // namespace capstan::invariance
