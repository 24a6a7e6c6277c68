// Predictions held against what the engine takes and sends, against arithmetic done by hand, and against the clock.
#include "support.h"

#include "comm/communicator.h"
#include "mesh/mesh.h"
#include "plan/report.h"

#include <capstan/batch.h>
#include <capstan/error.h>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <thread>
#include <tuple>
#include <utility>

namespace capstan::plan::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// What real ranks held and sent in one step.
struct Real {
  std::vector<std::int64_t> peak;      ///< by rank
  EngineMemory engine;                 ///< of rank 0
  std::map<std::string, double> sent;  ///< by rank 0, by communicator and collective
};

Real run_ranks(const std::vector<std::string>& overrides, const Setting& setting, std::int64_t vocabulary) {
  const Folder folder;
  const int ranks = setting.layout.world();
  const auto worlds = make_thread_worlds(ranks, 60);
  Real real;
  real.peak.resize(static_cast<std::size_t>(ranks));
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      try {
        auto s = train::open_session(folder.recipe(), overrides, CAPSTAN_PROGRAM, train::Placement::gradients, worlds[static_cast<std::size_t>(r)]);
        s->engine->attach(s->host->make_as<Optimizer>(s->options().plugin("optimizer")));
        s->engine->initialize();
        const std::vector<std::int32_t> tokens(static_cast<std::size_t>(setting.micro * setting.length), static_cast<std::int32_t>(vocabulary - 1));
        const std::vector<std::int32_t> lengths(static_cast<std::size_t>(setting.micro), static_cast<std::int32_t>(setting.length));
        std::int64_t of_batches = 0;
        const auto step = [&](std::int64_t n, bool whole) {
          std::vector<Batch> batches;
          const std::int64_t before = s->device->bytes_held();
          for (std::int64_t m = 0; m < setting.microbatches; ++m) {
            Batch batch = make_batch(*s->device, tokens, lengths, tokens);
            batch.step_weight = static_cast<double>(setting.sequences * setting.length);
            batches.push_back(std::move(batch));
          }
          of_batches = s->device->bytes_held() - before;
          if (whole) s->device->reset_peak();
          s->engine->forward_backward(std::span<const Batch>(batches), static_cast<std::uint64_t>(n));
          s->engine->update(n, 1, s->engine->gradient_norm(), 1);
        };
        step(1, false);  // what a first step alone takes is there to stay
        for (Communicator* c : s->mesh->communicators()) c->clear_ledger();
        step(2, true);
        // The batches of other microbatches are the loader's, which makes them as they are needed.
        real.peak[static_cast<std::size_t>(r)] = s->device->bytes_peak() - of_batches * (setting.microbatches - 1) / setting.microbatches;
        if (r == 0) {
          real.engine = s->engine->memory();
          for (const Communicator* c : s->mesh->communicators())
            for (const CommRecord& record : c->ledger()) real.sent[c->name() + " " + record.collective] += record.bytes;
        }
      } catch (const std::exception& e) {
        errors[static_cast<std::size_t>(r)] = std::current_exception();
        worlds[static_cast<std::size_t>(r)]->fail_job(e.what());
      }
    });
  for (std::thread& t : threads) t.join();
  for (const auto& e : errors)
    if (e) std::rethrow_exception(e);
  return real;
}

double sent(const Prediction& p, const std::string& axes, Collective c) {
  double bytes = 0;
  for (const Traffic& t : p.traffic)
    if (t.axes == axes && t.collective == c) bytes += t.bytes;
  return bytes;
}

class TwoRanks : public ::testing::TestWithParam<std::vector<std::string>> {};

TEST_P(TwoRanks, MemoryAndTrafficArePredictedWithinFivePercent) {
  std::vector<std::string> words{"model.width=96", "model.layers=3", "model.vocabulary=1000", "data.batch_size=8"};
  words.insert(words.end(), GetParam().begin(), GetParam().end());
  const Planned plan = plan_of(words, 2);
  const Real real = run_ranks(words, plan.setting, 1000);
  const Memory& m = plan.prediction.memory[0];
  std::printf("peak %.0f of %.0f KiB: state %.0f, activations %.0f, logits %.0f\n", double(m.total()) / 1024, double(real.peak[0]) / 1024, double(m.engine.total()) / 1024,
              double(m.activations) / 1024, double(m.logits) / 1024);
  EXPECT_EQ(m.engine.masters, real.engine.masters);
  EXPECT_EQ(m.engine.gradients, real.engine.gradients);
  EXPECT_EQ(m.engine.optimizer, real.engine.optimizer);
  EXPECT_EQ(m.engine.working, real.engine.working);
  EXPECT_EQ(m.engine.gather_pool, real.engine.gather_pool);
  EXPECT_EQ(m.engine.gradient_pool, real.engine.gradient_pool);
  EXPECT_EQ(m.quantized > 0, plan.setting.engine.linear.narrow());
  EXPECT_NEAR(double(m.total()) / double(real.peak[0]), 1, 0.05);

  double gathered = 0, scattered = 0, reduced = 0;
  for (const auto& [name, bytes] : real.sent) {
    std::printf("  sent %s: %.0f\n", name.c_str(), bytes);
    if (name.ends_with("all_gather")) gathered += bytes;
    if (name.ends_with("reduce_scatter")) scattered += bytes;
    if (name.ends_with("all_reduce")) reduced += bytes;
  }
  for (const char* axes : {"shard+context", "tensor", "context", "replicate"}) {
    gathered -= sent(plan.prediction, axes, Collective::all_gather);
    scattered -= sent(plan.prediction, axes, Collective::reduce_scatter);
    reduced -= sent(plan.prediction, axes, Collective::all_reduce);
  }
  double all = 0;
  for (const Traffic& t : plan.prediction.traffic) all += t.bytes;
  EXPECT_NEAR(gathered / all, 0, 0.05);
  EXPECT_NEAR(scattered / all, 0, 0.05);
  EXPECT_NEAR(reduced / all, 0, 0.05);
}

INSTANTIATE_TEST_SUITE_P(Strategies, TwoRanks,
                         ::testing::Values(std::vector<std::string>{"mesh.strategy=fsdp"}, std::vector<std::string>{"mesh.strategy=zero2"},
                                           std::vector<std::string>{"mesh.strategy=zero1"}, std::vector<std::string>{"mesh.strategy=ddp"},
                                           std::vector<std::string>{"mesh.replicate=2"},
                                           std::vector<std::string>{"mesh.strategy=fsdp", "precision.compute=bf16", "train.recompute=block", "model.tied=false"},
                                           std::vector<std::string>{"mesh.strategy=fsdp", "mesh.reshard_after_forward=false"}, std::vector<std::string>{"mesh.tensor=2"},
                                           std::vector<std::string>{"mesh.tensor=2", "precision.compute=bf16", "model.tied=false"},
                                           std::vector<std::string>{"mesh.context=2"}, std::vector<std::string>{"mesh.strategy=fsdp", "data.micro_batch=1"},
                                           std::vector<std::string>{"mesh.strategy=fsdp", "precision.compute=bf16", "precision.linear=fp8"},
                                           std::vector<std::string>{"mesh.strategy=ddp", "precision.linear=mxfp8"}));

class Pipelines : public ::testing::TestWithParam<std::vector<std::string>> {};

TEST_P(Pipelines, MemoryOfEachRankIsPredictedWithinFivePercent) {
  std::vector<std::string> words{"model.width=96", "model.layers=6", "model.vocabulary=1000", "data.batch_size=16", "data.micro_batch=2", "mesh.pp=2"};
  words.insert(words.end(), GetParam().begin(), GetParam().end());
  const int ranks = 4;
  const Planned plan = plan_of(words, ranks);
  const Real real = run_ranks(words, plan.setting, 1000);
  ASSERT_EQ(plan.prediction.memory.size(), 2u);
  for (int r = 0; r < 2; ++r) {
    const Memory& m = plan.prediction.memory[static_cast<std::size_t>(r)];
    const auto held = double(real.peak[static_cast<std::size_t>(r * ranks / 2)]);
    std::printf("rank %d: peak %.0f of %.0f KiB: state %.0f, activations %.0f (%d live), logits %.0f\n", r, double(m.total()) / 1024, held / 1024, double(m.engine.total()) / 1024,
                double(m.activations) / 1024, m.live, double(m.logits) / 1024);
    EXPECT_NEAR(double(m.total()) / held, 1, 0.05) << r;
  }
}

INSTANTIATE_TEST_SUITE_P(Schedules, Pipelines,
                         ::testing::Values(std::vector<std::string>{}, std::vector<std::string>{"mesh.pipeline.schedule=gpipe", "mesh.tensor=2"},
                                           std::vector<std::string>{"mesh.pipeline.schedule=interleaved", "mesh.pipeline.stages_per_rank=2"},
                                           std::vector<std::string>{"mesh.strategy=zero1", "train.recompute=block"},
                                           std::vector<std::string>{"mesh.pipeline.schedule=zero_bubble"}));

const std::vector<std::string> llama_405b{"model.layers=126", "model.heads=128", "model.kv_heads=8", "model.width=16384", "model.ffn=53248",
                                          "model.vocabulary=128256", "model.tied=false", "model.context=8192", "data.sequence_length=8192", "precision.compute=bf16"};

TEST(Plan, AHundredThousandRanksAreAnsweredInASecond) {
  std::vector<std::string> words = llama_405b;
  for (const char* w : {"data.batch_size=8000", "data.micro_batch=1", "mesh.pp=10", "mesh.tensor=8", "mesh.replicate=10", "mesh.pipeline.schedule=1f1b", "train.recompute=block"})
    words.emplace_back(w);
  const DeviceModel h200 = device("h200");
  const std::clock_t begin = std::clock();
  const Planned p = plan_of(words, 100000, &h200);
  const double seconds = double(std::clock() - begin) / CLOCKS_PER_SEC;
  std::printf("%.2f s of processor time\n%s", seconds, to_text(p.prediction, p.setting, &h200, {}).c_str());
  EXPECT_LT(seconds, 1.5);
  EXPECT_EQ(p.setting.size("shard"), 125);
  EXPECT_GT(p.prediction.share_of_peak, 0.1);
  EXPECT_LT(p.prediction.share_of_peak, 0.9);
}

TEST(Plan, StateOfFsdpIsSixteenBytesAParameterOverTheRanks) {
  std::vector<std::string> words = llama_405b;
  words.emplace_back("data.batch_size=1024"), words.emplace_back("precision.compute=f32");
  const Planned p = plan_of(words, 1024);
  const Memory& m = p.prediction.memory[0];
  const double n = double(p.prediction.parameters);
  EXPECT_NEAR(n, 405.85e9, 0.01e9);
  EXPECT_NEAR(double(m.engine.masters + m.engine.gradients + m.engine.optimizer) / (16 * n / 1024), 1, 0.001);
  const double largest = 16384.0 * 16384 * 2 + 2 * 16384.0 * 1024 + 3 * 16384.0 * 53248 + 2 * 16384;
  EXPECT_NEAR(double(m.engine.gather_pool) / (2 * 4 * largest), 1, 0.001);
  // Forward and backward gather all units once each, but for the head's, which is still there.
  const double head = 128256.0 * 16384 + 16384;
  EXPECT_NEAR(sent(p.prediction, "shard+context", Collective::all_gather) / (4 * (2 * n - head) * 1023 / 1024), 1, 0.001);
  EXPECT_NEAR(sent(p.prediction, "shard+context", Collective::reduce_scatter) / (4 * n * 1023 / 1024), 1, 0.001);
}

TEST(Plan, ReplicasAddOneReductionOfThePieces) {
  const Planned one = plan_of({"data.batch_size=64"}, 8), copies = plan_of({"data.batch_size=64", "mesh.replicate=2"}, 8);
  EXPECT_EQ(sent(one.prediction, "replicate", Collective::all_reduce), 0);
  const double piece = double(copies.prediction.memory[0].engine.gradients);
  EXPECT_NEAR(sent(copies.prediction, "replicate", Collective::all_reduce) / piece, 1, 1e-9);  // 2 (n - 1) / n of it
  EXPECT_NEAR(double(copies.prediction.memory[0].engine.masters) / double(one.prediction.memory[0].engine.masters), 2, 0.02);
}

TEST(Plan, TheFirstPipelineRankKeepsMostAndTheBubbleIsTheUsual) {
  const DeviceModel h100 = device("h100");
  std::vector<std::string> words = llama_405b;
  for (const char* w : {"data.batch_size=16", "data.micro_batch=1", "mesh.tensor=8", "mesh.pp=4", "model.layers=64"}) words.emplace_back(w);
  const Planned p = plan_of(words, 32, &h100);
  ASSERT_EQ(p.prediction.memory.size(), 4u);
  EXPECT_EQ(p.prediction.memory[0].live, 4);
  EXPECT_EQ(p.prediction.memory[3].live, 1);
  EXPECT_EQ(p.prediction.worst, 0u);
  EXPECT_NEAR(p.prediction.bubble, 3.0 / (16 + 3), 0.04);
  words.emplace_back("mesh.pipeline.schedule=interleaved"), words.emplace_back("mesh.pipeline.stages_per_rank=4");
  const Planned interleaved = plan_of(words, 32, &h100);
  EXPECT_LT(interleaved.prediction.bubble, p.prediction.bubble / 2);
  EXPECT_GT(interleaved.prediction.tokens_per_rank, p.prediction.tokens_per_rank);
}

TEST(Plan, WhatDoesNotFitComesWithKeysThatHelp) {
  const Folder folder;
  const std::vector<std::string> words{"model.layers=32", "model.heads=32", "model.width=4096", "model.context=8192", "data.sequence_length=8192", "data.batch_size=64", "precision.compute=bf16"};
  const auto session = train::open_session(folder.recipe(), words, CAPSTAN_PROGRAM, train::Placement::none, make_paper_world(0, 8));
  const Setting setting = setting_from(*session, 8);
  const Sources sources = sources_from(*session);
  const DeviceModel h100 = device("h100");
  const Prediction p = predict(sources, setting, &h100);
  ASSERT_GT(double(p.memory[p.worst].total()), h100.memory);
  const std::vector<Advice> advice = advise(sources, setting, h100.memory);
  ASSERT_FALSE(advice.empty());
  EXPECT_TRUE(advice[0].fits) << advice[0].key;
  const std::string text = to_text(p, setting, &h100, advice);
  EXPECT_THAT(text, HasSubstr("does not fit"));
  EXPECT_THAT(text, HasSubstr(advice[0].key));
}

TEST(Plan, AMeshThatDoesNotFitIsRefusedAtItsKey) {
  try {
    plan_of({"mesh.tensor=3"}, 8);
    FAIL() << "it was taken";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("mesh.tensor"));
  }
  try {
    plan_of({"data.batch_size=4"}, 8);
    FAIL() << "it was taken";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("data.batch_size"));
  }
}

TEST(GroupShapes, FollowTheRowMajorRanks) {
  const MeshLayout layout = MeshLayout::make({{"pp", 2}, {"replicate", 1}, {"shard", 8}, {"context", 1}, {"tensor", 4}}, 64);
  EXPECT_EQ(group_shape(layout, "tensor", 8), (GroupShape{4, 1, 4}));
  EXPECT_EQ(group_shape(layout, "shard+context", 8), (GroupShape{8, 4, 2}));
  EXPECT_EQ(group_shape(layout, "pp", 8), (GroupShape{2, 2, 1}));
  EXPECT_EQ(group_shape(layout, "pp+replicate+shard+context+tensor", 8), (GroupShape{64, 8, 8}));
}

TEST(Devices, TheInstalledTableIsGoodAndWrongNamesListTheRightOnes) {
  const std::string file = devices_file(CAPSTAN_PROGRAM);
  for (const char* name : {"h100", "h100-500w-96gb", "h200", "b200", "a100", "cpu"}) EXPECT_GT(load_device(file, name).memory, 1e9) << name;
  try {
    load_device(file, "h300");
    FAIL() << "it was found";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("h200"));
  }
}

// A number that no int holds must not become another one on its way.
TEST(Devices, CountsAreKeptWithinTheirRange) {
  std::ifstream in(devices_file(CAPSTAN_PROGRAM));
  const std::string table(std::istreambuf_iterator<char>(in), {});
  const Folder folder;
  for (const auto& [good, bad, key] : {std::tuple{"cores: 132", "cores: 4294967428", "cores"}, std::tuple{"per_host: 8", "per_host: 4294967304", "per_host"}}) {
    const std::string file = folder.recipe() + ".devices.yaml";
    std::string changed = table;
    ASSERT_NE(changed.find(good), std::string::npos);
    std::ofstream(file) << changed.replace(changed.find(good), std::string(good).size(), bad);
    try {
      load_device(file, "h100");
      ADD_FAILURE() << key << " was taken";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), AllOf(HasSubstr("devices.yaml:"), HasSubstr(std::string("devices.0.") + key), HasSubstr("1048576")));
    }
  }
}

// The table's own sources: what the model must give back of them.
TEST(Devices, KernelsMeasuredAloneAreWithinTenPercent) {
  const DeviceModel h100 = device("h100"), h200 = device("h200");
  EXPECT_NEAR(h100.product_efficiency({8192, 8192, 8192}) * 989.4, 795, 80);
  EXPECT_NEAR(h100.product_efficiency({4096, 4096, 4096}) * 989.4, 716, 72);
  const auto attention = [&](double length, bool backward) {
    const double flop = 1e15;
    return flop / (h200.attention(flop, length, 128, backward, DType::bf16) / (backward ? 1.25 : 1)) * 1e-12;
  };
  const std::vector<std::vector<double>> measured{{2048, 484, 370}, {4096, 591, 474}, {8192, 644, 541}, {16384, 673, 579}, {32768, 688, 581}};
  for (const auto& row : measured) {
    EXPECT_NEAR(attention(row[0], false), row[1], 0.1 * row[1]) << row[0];
    EXPECT_NEAR(attention(row[0], true), row[2], 0.1 * row[2]) << row[0];
  }
}

TEST(Devices, AcrossHostsAGroupSharesTheirAdapters) {
  const DeviceModel h100 = device("h100");
  const double bytes = 1e9;
  const double whole_hosts = h100.collective(Collective::all_gather, bytes, {16, 2, 8}), one_each = h100.collective(Collective::all_gather, bytes, {2, 2, 1});
  EXPECT_NEAR(whole_hosts, bytes * 15 / 16 / h100.host.bandwidth, 0.05 * whole_hosts);   // the ring within is the slower part
  EXPECT_NEAR(one_each, bytes / 2 / h100.network.bandwidth, 0.05 * one_each);
  EXPECT_DOUBLE_EQ(h100.collective(Collective::all_reduce, bytes, {8, 1, 8}), 2 * h100.collective(Collective::reduce_scatter, bytes, {8, 1, 8}));
}

// Each of the four data ranks has a quarter of the sequences of eight steps, in microbatches as large as in training.
TEST(Memory, ValidationsComeBetweenSteps) {
  const Planned none = plan_of({}, 4), some = plan_of({"train.validate_every=1", "data.validation=0.1"}, 4);
  EXPECT_EQ(none.prediction.memory[0].validation + none.prediction.memory[0].bigram, 0);
  const Memory& m = some.prediction.memory[0];
  EXPECT_GT(m.validation, 2 * 16 * 64 * 24);
  EXPECT_LT(m.validation, none.prediction.memory[0].activations + none.prediction.memory[0].logits);
  EXPECT_EQ(m.bigram, 257 * 258 * 8 + 8 * 16 * 64 * 20);
  EXPECT_EQ(some.setting.validation_micro, some.setting.micro);
  EXPECT_EQ(m.total(), none.prediction.memory[0].total()) << "activations are more";
  Memory most = m;
  most.validation = 1 << 30, most.bigram = 1 << 20, most.staging = 1 << 10;
  EXPECT_EQ(most.total(true), most.engine.total() + (1 << 30) + (1 << 20) + (1 << 10));
  EXPECT_EQ(most.total(false), most.engine.total() + (1 << 30)) << "a device does not hold what is its host's";
  EXPECT_THAT(to_text(some.prediction, some.setting, nullptr, {}), AllOf(HasSubstr("  validation "), HasSubstr("  bigram model ")));
  EXPECT_THAT(to_text(none.prediction, none.setting, nullptr, {}), ::testing::Not(HasSubstr("validation")));
}

TEST(Report, JsonSaysWhatTheTableSays) {
  const DeviceModel h200 = device("h200");
  const Planned p = plan_of({"mesh.tensor=2"}, 4, &h200);
  const auto j = nlohmann::json::parse(to_json(p.prediction, p.setting, &h200, {}));
  EXPECT_EQ(j.at("ranks"), 4);
  EXPECT_EQ(j.at("mesh").at("tensor"), 2);
  EXPECT_EQ(j.at("memory").at(0).at("total").get<std::int64_t>(), p.prediction.memory[0].total());
  EXPECT_EQ(j.at("traffic").size(), p.prediction.traffic.size());
  EXPECT_TRUE(j.at("device").at("fits"));
  EXPECT_DOUBLE_EQ(j.at("time").at("step").get<double>(), p.prediction.step);
}

}  // namespace
}  // namespace capstan::plan::testing
