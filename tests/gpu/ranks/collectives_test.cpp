// Collectives among GPUs: the battery of those among CPUs, staged on one GPU and, where each rank has its own, over NCCL;
// which of the two is taken, and how a choice that cannot be is refused.
#include "base/cuda_device.h"
#include "base/short_bytes.h"
#include "comm/gpu_world.h"
#include "core/comm/battery.h"
#include "core/comm/threads.h"
#include "gpu/ranks/facade.h"

#include <capstan/error.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <kernels/backend.h>
#include <kernels/queue.h>

#include <chrono>
#include <thread>

namespace capstan {
namespace {

using ::testing::AllOf;
using testing::Battery;
using ::testing::HasSubstr;
using testing::on_ranks;

/// The body on every rank, with the rank's own device on GPU local rank mod `gpus`.
std::vector<std::string> on_gpus(int ranks, int gpus, GpuCommunication choice, double timeout,
                                 const std::function<void(World&, Device&, const GpuRanks&)>& body) {
  auto worlds = make_thread_worlds(ranks, timeout);
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      const auto i = static_cast<std::size_t>(r);
      try {
        const std::shared_ptr<Device> device = make_cuda_device(r % gpus, 1);
        const GpuRanks gpu = make_gpu_world(worlds[i], device, choice);
        body(*gpu.world, *device, gpu);
      } catch (const std::exception& e) {
        errors[i] = e.what();
        worlds[i]->fail_job(e.what());
      }
      worlds[i].reset();
    });
  for (auto& t : threads) t.join();
  return errors;
}

/// Each with GPUs enough for NCCL, or skipped.
int gpus_for(GpuCommunication choice, int ranks) { return choice == GpuCommunication::nccl ? ranks : 1; }

class GpuCollectives : public ::testing::TestWithParam<std::tuple<GpuCommunication, int>> {
 protected:
  void SetUp() override {
    if (gpus() > cuda_device_count()) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  }
  GpuCommunication choice() const { return std::get<0>(GetParam()); }
  int ranks() const { return std::get<1>(GetParam()); }
  int gpus() const { return gpus_for(choice(), ranks()); }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuCollectives,
                         ::testing::Combine(::testing::Values(GpuCommunication::staged, GpuCommunication::nccl),
                                            ::testing::Values(2, 3, 4)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == GpuCommunication::nccl ? "nccl" : "staged") +
                                  std::to_string(std::get<1>(info.param));
                         });

TEST_P(GpuCollectives, RandomOnesOnManyCommunicatorsAtOnceGiveThoseOfPlainLoops) {
  const auto errors = on_gpus(ranks(), gpus(), choice(), 60, [&](World& world, Device& device, const GpuRanks& gpu) {
    testing::FacadeWorld facade(gpu.world, device.shared_from_this());
    Battery(facade, 7, {choice() == GpuCommunication::staged}).run(80, 60'000);
    EXPECT_EQ(world.backend(), choice() == GpuCommunication::nccl ? "nccl" : "staged");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, SeveralPiecesStartAfterWhatIsQueuedAndEndBeforeWhatIsQueuedLater) {
  const int n = ranks();
  const std::int64_t count = n == 2 ? (1 << 19) + 5 : 1001;  // several pieces, or one
  const auto errors = on_gpus(n, gpus(), choice(), 60, [&](World& world, Device& device, const GpuRanks&) {
    std::vector<int> all;
    for (int r = 0; r < n; ++r) all.push_back(r);
    const auto c = world.make("all", all), other = world.make("other", all);
    const Tensor x = Tensor::full(Dims{count}, 1, DType::f32, device),
                 whole = Tensor::zeros(Dims{count * n}, DType::f32, device);
    x.fill(world.rank() + 1);  // not waited for
    Handle gathered = other->all_gather(x.raw(), whole.raw(), count, DType::f32);
    const Tensor y = x.clone();
    Handle summed = c->all_reduce(y.raw(), count, DType::f32);
    gathered.wait();
    summed.wait();
    const Tensor after = y.clone();  // in the stream, no wait of the host
    const double sum = n * (n + 1) / 2.0;
    for (const std::int64_t i : {std::int64_t{0}, count / 2, count - 1})
      testing::require(after.narrow(0, i, 1).item() == sum, "sum");
    for (int r = 0; r < n; ++r) testing::require(whole.narrow(0, count * r + count - 1, 1).item() == r + 1, "gather");
    c->reduce_scatter(whole.raw(), x.raw(), count, DType::f32).wait();
    testing::require(x.narrow(0, count - 3, 1).item() == n * (world.rank() + 1), "reduce_scatter");
    // Memory of the kind that the communicator likes best.
    const auto memory = world.shared_memory(static_cast<std::size_t>(4 * count));
    c->adopt(memory, static_cast<std::size_t>(4 * count));
    const Tensor z = Tensor::wrap(memory.get(), Dims{count}, DType::f32, device, memory);
    z.fill(2);
    c->all_reduce(z.raw(), count, DType::f32, Reduction::max).wait();
    testing::require(z.narrow(0, 7, 1).item() == 2, "max");
    c->barrier();
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, MemoryThatALibraryTakesIsCountedAndNamedWhenThereIsNoMore) {
  if (choice() == GpuCommunication::staged) GTEST_SKIP() << "the device's own pool has it all";
  const auto errors = on_gpus(ranks(), gpus(), choice(), 60, [&](World& world, Device& device, const GpuRanks&) {
    const std::int64_t before = device.bytes_held();
    const auto said = [&] {
      try {
        device.allocate(std::int64_t{1} << 50);
      } catch (const Error& e) {
        return std::string(e.what());
      }
      return std::string("nothing");
    };
    testing::require(said().find("NCCL") == std::string::npos, "NCCL has nothing yet: " + said());
    {
      std::vector<int> all;
      for (int r = 0; r < ranks(); ++r) all.push_back(r);
      const auto c = world.make("all", all);
      const std::int64_t buffers = communication_bytes(device);
      testing::require(buffers >= (1 << 20), "a communicator's buffers: " + std::to_string(buffers));
      const auto memory = world.shared_memory(std::size_t{3} << 28);
      c->adopt(memory, std::size_t{3} << 28);
      testing::require(communication_bytes(device) - buffers == std::int64_t{3} << 28, "registered memory");
      testing::require(device.bytes_held() - before == communication_bytes(device), "bytes_held");
      // NCCL's own buffers differ by GPU and version.
      const std::string words = "NCCL " + short_bytes(static_cast<double>(communication_bytes(device))) + " (its communicators, and memory registered with them)";
      testing::require(said().find(words) != std::string::npos, said());
      c->barrier();
    }
    testing::require(communication_bytes(device) == 0 && device.bytes_held() == before, "all of it is given back");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

// Registering may end behind the caller's back (the emulated NCCL's does so late, and takes no other call meanwhile).
TEST_P(GpuCollectives, MemoryIsRegisteredWhenAdoptReturns) {
  const int n = ranks();
  const auto errors = on_gpus(n, gpus(), choice(), 20, [&](World& world, Device& device, const GpuRanks&) {
    std::vector<int> all;
    for (int r = 0; r < n; ++r) all.push_back(r);
    const auto c = world.make("all", all);
    const std::int64_t count = 1 << 18;
    std::vector<Tensor> pools;
    for (int k = 0; k < 3; ++k) {
      const auto memory = world.shared_memory(4 * count);
      c->adopt(memory, 4 * count);
      pools.push_back(Tensor::wrap(memory.get(), Dims{count}, DType::f32, device, memory));
      pools.back().fill(world.rank() + k);
      c->all_reduce(pools.back().raw(), count, DType::f32).wait();
    }
    for (int k = 0; k < 3; ++k)
      testing::require(pools[static_cast<std::size_t>(k)].narrow(0, count - 1, 1).item() == n * (n - 1) / 2 + n * k, "sum");
    c->barrier();
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, AHandleKeepsWhatItWaitsFor) {
  const int n = ranks();
  const auto errors = on_gpus(n, gpus(), choice(), 20, [&](World& world, Device& device, const GpuRanks&) {
    std::vector<int> all;
    for (int r = 0; r < n; ++r) all.push_back(r);
    const Tensor x = Tensor::full(Dims{64}, 1, DType::f32, device);
    auto c = world.make("all", all);
    const std::weak_ptr<Communicator> left = c;
    Handle h = c->all_reduce(x.raw(), 64, DType::f32);
    c.reset();
    if (choice() == GpuCommunication::nccl) testing::require(!left.expired(), "the communicator is gone before its collective");
    h.wait();
    testing::require(x.narrow(0, 63, 1).item() == n && left.expired(), "sum");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, AfterOneThatIsRefusedOthersGoOn) {
  const int n = ranks();
  const auto errors = on_gpus(n, gpus(), choice(), 20, [&](World& world, Device& device, const GpuRanks&) {
    std::vector<int> all;
    for (int r = 0; r < n; ++r) all.push_back(r);
    const auto c = world.make("all", all);
    const Tensor x = Tensor::full(Dims{64 * n}, 1, DType::f32, device), y = Tensor::zeros(Dims{64 * n}, DType::f32, device);
    if (choice() == GpuCommunication::nccl) {
      std::string said = "nothing";
      try {
        c->all_to_all(x.raw(), y.raw(), 64, DType::f8e4m3).wait();
      } catch (const Error& e) {
        said = e.what();
      }
      testing::require(said.find("NCCL does not know f8e4m3") != std::string::npos, said);
    }
    c->all_reduce(x.raw(), 64 * n, DType::f32).wait();
    testing::require(x.narrow(0, 63, 1).item() == n, "sum");
    c->barrier();
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, OneRankCopies) {
  const auto errors = on_gpus(ranks(), gpus(), choice(), 60, [&](World& world, Device& device, const GpuRanks&) {
    const auto c = world.make("alone", {world.rank()});
    const Tensor x = Tensor::full(Dims{3}, 5, DType::bf16, device), y = Tensor::zeros(Dims{3}, DType::bf16, device);
    c->all_gather(x.raw(), y.raw(), 3, DType::bf16).wait();
    testing::require(y.narrow(0, 2, 1).item() == 5, "copy");
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST_P(GpuCollectives, ARankThatDoesNotComeEndsTheJobByName) {
  if (choice() == GpuCommunication::staged && ranks() > 2) GTEST_SKIP() << "once is enough";
  const int n = ranks();
  const auto errors = on_gpus(n, gpus(), choice(), 1, [&](World& world, Device& device, const GpuRanks&) {
    std::vector<int> all;
    for (int r = 0; r < n; ++r) all.push_back(r);
    const auto c = world.make("shard/gather", all);
    const Tensor x = Tensor::full(Dims{8}, 1, DType::f32, device);
    if (world.rank() == n - 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2500));
      return;
    }
    Handle h = c->all_reduce(x.raw(), 8, DType::f32);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    while (!h.done() && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    h.wait();
  });
  EXPECT_THAT(errors[0], AllOf(HasSubstr("all_reduce"), HasSubstr("shard/gather"))) << errors[0];
}

// A collective that does not end is before all that is queued: whoever waits for the GPU must not wait for ever.
TEST(GpuCollectivesToo, AHostThatWaitsForItsGpuIsFreedWhenACollectiveDoesNotEnd) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  const auto errors = on_gpus(2, 2, GpuCommunication::nccl, 1, [&](World& world, Device& device, const GpuRanks&) {
    const auto c = world.make("shard/gather", {0, 1});
    const Tensor x = Tensor::full(Dims{8}, 1, DType::f32, device);
    if (world.rank() == 1) return std::this_thread::sleep_for(std::chrono::milliseconds(2500));
    c->all_reduce(x.raw(), 8, DType::f32).wait();
    device.synchronize();
    c->all_reduce(x.raw(), 8, DType::f32).wait();
  });
  EXPECT_THAT(errors[0], AllOf(HasSubstr("all_reduce of communicator 'shard/gather'"), HasSubstr("has not ended within 1 s"))) << errors[0];
}

/// A record that adds 1 to `x`, sums it over the ranks on one communicator, and the sum over them on another.
std::int64_t record_sums(kernels::Queue& queue, Communicator& a, Communicator& b, const Tensor& x, const Tensor& y) {
  queue.begin_record(1);
  x.device().backend().scale(kernels::Num::f32, x.numel(), x.raw(), 1, 1, x.raw());
  a.all_reduce(x.raw(), x.numel(), DType::f32).wait();
  y.copy_from(x);
  Handle one = b.all_reduce(y.raw(), y.numel(), DType::f32), other = a.all_reduce(x.raw(), x.numel(), DType::f32);
  one.wait(), other.wait();
  return queue.end_record();
}

TEST(GpuRecords, CollectivesAreReplayedWithTheMemoryOfThatTime) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  const auto errors = on_gpus(2, 2, GpuCommunication::nccl, 20, [&](World& world, Device& device, const GpuRanks&) {
    testing::require(world.cannot_record().empty(), world.cannot_record());
    const auto a = world.make("shard/gather", {0, 1}), b = world.make("shard/reduce", {0, 1});
    kernels::Queue& queue = *device.backend().queue();
    const Tensor x = Tensor::full(Dims{1000}, world.rank(), DType::f32, device), y = Tensor::zeros(Dims{1000}, DType::f32, device);
    const std::int64_t record = record_sums(queue, *a, *b, x, y);
    testing::require(x.narrow(0, 999, 1).item() == world.rank(), "recording must run nothing");
    double want_x = 0.5;  // of both ranks on average
    for (std::uint64_t step = 1; step <= 3; ++step) {
      world.replay([&] { queue.replay(record, step); });
      const double sum = 2 * (want_x + 1);
      want_x = 2 * sum;
      testing::require(x.narrow(0, 999, 1).item() == want_x && y.narrow(0, 0, 1).item() == want_x, "step " + std::to_string(step));
    }
    queue.forget_record(record);
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

// Collectives that the record begins must be waited for in it, and others' handles are none of its business.
TEST(GpuRecords, WhatIsNotWaitedForInsideIsRefused) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  const auto errors = on_gpus(2, 2, GpuCommunication::nccl, 20, [&](World& world, Device& device, const GpuRanks&) {
    const auto c = world.make("shard/gather", {0, 1});
    kernels::Queue& queue = *device.backend().queue();
    const Tensor x = Tensor::full(Dims{8}, 1, DType::f32, device);
    const auto fails = [](const std::function<void()>& f) {
      try {
        f();
      } catch (const std::exception&) {
        return true;
      }
      return false;
    };
    queue.begin_record(1);
    {
      Handle outlives = c->all_reduce(x.raw(), 8, DType::f32);
      testing::require(fails([&] { queue.end_record(); }), "a collective that goes on behind the record");
    }
    Handle before = c->all_reduce(x.raw(), 8, DType::f32);
    queue.begin_record(1);
    testing::require(fails([&] { before.wait(); }), "a wait for a collective ahead of the record");
    queue.cancel_record();
    queue.begin_record(1);
    testing::require(fails([&] { c->send(x.raw(), 8, DType::f32, 1 - world.rank()).wait(); }), "a send");
    queue.cancel_record();
    device.synchronize();
    c->all_reduce(x.raw(), 8, DType::f32).wait();
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(GpuRecords, AReplayThatDoesNotEndEndsTheJobAndFreesTheHost) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  const auto errors = on_gpus(2, 2, GpuCommunication::nccl, 1, [&](World& world, Device& device, const GpuRanks&) {
    const auto a = world.make("shard/gather", {0, 1}), b = world.make("shard/reduce", {0, 1});
    kernels::Queue& queue = *device.backend().queue();
    const Tensor x = Tensor::full(Dims{8}, 1, DType::f32, device), y = x.clone();
    struct Kept {  // as an engine's: gone before its communicators
      kernels::Queue& queue;
      std::int64_t record;
      ~Kept() { queue.forget_record(record); }
    } const kept{queue, record_sums(queue, *a, *b, x, y)};
    if (world.rank() == 1) return std::this_thread::sleep_for(std::chrono::milliseconds(2500));
    world.replay([&] { queue.replay(kept.record, 1); });
    device.synchronize();
    a->all_reduce(x.raw(), 8, DType::f32).wait();
  });
  EXPECT_THAT(errors[0], AllOf(HasSubstr("a recorded step of communicator 'shard/"), HasSubstr("has not ended within 1 s"))) << errors[0];
}

TEST(GpuChoice, RanksThatShareAGpuGoThroughTheHostAndSaySo) {
  const auto errors = on_gpus(3, 1, GpuCommunication::automatic, 20, [](World& world, Device&, const GpuRanks& gpu) {
    testing::require(world.backend() == "staged", "backend");
    testing::require(gpu.words == "through host memory (3 ranks share 1 GPU)", gpu.words);
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

TEST(GpuChoice, NcclForRanksThatShareAGpuIsRefusedWithTheKey) {
  const auto errors = on_gpus(2, 1, GpuCommunication::nccl, 20, [](World&, Device&, const GpuRanks&) {});
  for (const auto& e : errors)
    EXPECT_THAT(e, AllOf(HasSubstr("mesh.gpu_communication"), HasSubstr("ranks 0 and 1 share"),
                         HasSubstr("at most 1 rank on that host"), HasSubstr("staged")));
}

TEST(GpuChoice, AGpuForEachRankIsNccl) {
  if (cuda_device_count() < 2) GTEST_SKIP() << "there is one GPU";
  const auto errors = on_gpus(2, 2, GpuCommunication::automatic, 20, [](World& world, Device&, const GpuRanks& gpu) {
    testing::require(world.backend() == "nccl" && gpu.words.starts_with("by NCCL 2."), gpu.words);
  });
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

}  // namespace
}  // namespace capstan
