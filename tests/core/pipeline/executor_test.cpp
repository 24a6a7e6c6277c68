// The executor on ranks that are threads: every schedule gives the losses and gradients of a model in one piece.
#include "pipeline/executor.h"
#include "pipeline/stages.h"
#include "tests/core/comm/threads.h"
#include "tests/core/pipeline/chain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <support/tolerance.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace capstan::pipeline {
namespace {

using ::capstan::testing::on_ranks;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::Each;
using ::testing::HasSubstr;
using namespace pipeline_test;

/// What a step gives: gradients by parameter, summed over the ranks that have one, and every loss entry's bits by name.
struct Outcome {
  std::map<std::string, std::vector<double>> gradients;
  std::map<std::string, int> holders;
  std::map<std::string, std::vector<double>> losses;

  void add(const Model& model) {
    for (Parameter* p : model.parameters()) {
      if (!p->leaf()->has_grad()) continue;
      const Tensor g = p->leaf()->grad().to(DType::f64).contiguous();
      auto& sum = gradients[p->name()];
      sum.resize(static_cast<std::size_t>(g.numel()));
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += g.data<double>()[i];
      ++holders[p->name()];
    }
  }
  void add(const std::vector<LossEntry>& entries) {
    for (const LossEntry& l : entries) losses[l.name].push_back(l.sum.item());
  }
  void sort() {
    for (auto& [name, values] : losses) std::sort(values.begin(), values.end());
  }
};

struct Task {
  DType dtype = DType::f64;
  int middles = 6;
  std::vector<std::int64_t> rows{6, 6, 6};
  bool recompute = false;
};

Outcome alone(const Task& task) {
  const auto device = make_cpu_device(1);
  Chain model(task.middles);
  model.place(*device, task.dtype);
  Outcome outcome;
  for (std::size_t m = 0; m < task.rows.size(); ++m) {
    const Batch batch = batch_of(*device, task.rows[m], static_cast<int>(m));
    ForwardContext c = context_of(batch, *device, task.dtype);
    forward_backward(model, c, {}, task.recompute);
    outcome.add(c.losses());
  }
  outcome.add(model);
  outcome.sort();
  return outcome;
}

/// Microbatches of a rank and their contexts, in memory that stays.
struct Microbatches {
  std::deque<Batch> batches;
  std::deque<ForwardContext> contexts;
  std::vector<ForwardContext*> pointers;
  Microbatches(const Task& task, Device& device, bool grad = true) {
    for (std::size_t m = 0; m < task.rows.size(); ++m) {
      batches.push_back(batch_of(device, task.rows[m], static_cast<int>(m)));
      contexts.push_back(context_of(batches.back(), device, task.dtype, grad));
      pointers.push_back(&contexts.back());
    }
  }
};

std::vector<int> even_cut(const Model& model, int stages) {
  return cut_into_stages(std::vector<CallCost>(model.calls().size(), CallCost{1, 1, 1}), stages);
}

Outcome piped(const Task& task, const Plan& plan, int steps = 1) {
  Outcome outcome;
  std::mutex mutex;
  const auto errors = on_ranks(plan.ranks, 20, [&](World& world) {
    std::vector<int> all;
    for (int r = 0; r < world.size(); ++r) all.push_back(r);
    const auto pp = world.make("pp", all);
    const auto device = make_cpu_device(1);
    Chain model(task.middles);
    model.place(*device, task.dtype);
    Executor executor(model, *pp, plan, even_cut(model, plan.stages()), {task.recompute, {}});
    for (int step = 0; step < steps; ++step) {
      for (Parameter* p : model.parameters()) p->leaf()->clear();
      Microbatches micro(task, *device);
      const auto losses = executor.run(micro.pointers);
      if (step + 1 < steps) continue;
      const std::lock_guard lock(mutex);
      outcome.add(losses);
    }
    for (std::size_t c = 0; c < model.calls().size(); ++c) {
      const bool mine = executor.stage_of_call()[c] % plan.ranks == world.rank();
      const auto elsewhere = [&](const Parameter* p) {
        for (std::size_t d = 0; d < model.calls().size(); ++d) {
          const auto used = model.calls()[d].block->parameters();
          if (std::find(used.begin(), used.end(), p) != used.end() && executor.stage_of_call()[d] % plan.ranks == world.rank()) return true;
        }
        return false;
      };
      for (Parameter* p : model.calls()[c].block->parameters()) EXPECT_EQ(p->leaf()->has_grad(), mine || elsewhere(p)) << p->name();
    }
    const std::lock_guard lock(mutex);
    outcome.add(model);
  });
  EXPECT_THAT(errors, Each(""));
  outcome.sort();
  return outcome;
}

std::string name(const Task& t, const Plan& p) {
  return std::string(name_of(p.kind)) + " ranks " + std::to_string(p.ranks) + " x " + std::to_string(p.stages_per_rank) + ", " +
         std::to_string(t.rows.size()) + " microbatches" + (t.recompute ? ", recompute" : "");
}

std::vector<Plan> plans(int ranks) {
  using K = ScheduleKind;
  return {{K::gpipe, ranks, 1}, {K::gpipe, ranks, 2}, {K::one_f_one_b, ranks, 1}, {K::interleaved, ranks, 2}, {K::zero_bubble, ranks, 1}, {K::zero_bubble, ranks, 2}};
}

void expect_equal(const Outcome& a, const Outcome& b, double tolerance, const std::string& where, bool exact = true) {
  EXPECT_EQ(a.losses, b.losses) << where;  // bit by bit
  ASSERT_EQ(a.gradients.size(), b.gradients.size()) << where;
  for (const auto& [parameter, expected] : b.gradients) {
    const auto& got = a.gradients.at(parameter);
    ASSERT_EQ(got.size(), expected.size()) << where;
    // The same sums in the same order; but what two stages use adds up stage by stage.
    const bool bits = exact && parameter != "middle1.w";
    double scale = 0;
    for (const double x : expected) scale = std::max(scale, std::abs(x));
    ASSERT_GT(scale, 1e-3) << where << " " << parameter;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double most = bits ? 0 : tolerance * scale;
      ASSERT_LE(std::abs(got[i] - expected[i]), most) << where << " " << parameter << " " << i;
    }
  }
}

TEST(Executor, GivesTheGradientsOfOnePiece) {
  int runs = 0;
  for (const int microbatches : {1, 3, 5, 8})
    for (const bool recompute : {false, true}) {
      const Task task{DType::f64, 6, std::vector<std::int64_t>(static_cast<std::size_t>(microbatches), 6), recompute};
      const Outcome expected = alone(task);
      for (const int ranks : {1, 2, 4})
        for (const Plan& plan : plans(ranks)) expect_equal(piped(task, plan), expected, bounds::mesh(DType::f64), name(task, plan)), ++runs;
    }
  EXPECT_EQ(runs, 144);
}

TEST(Executor, GivesTheSameBitsInSinglePrecision) {
  const Task task{DType::f32, 6, {6, 6, 6, 6, 6}, false};
  const Outcome expected = alone(task);
  for (const int ranks : {2, 4})
    for (const Plan& plan : plans(ranks)) expect_equal(piped(task, plan), expected, bounds::mesh(DType::f32), name(task, plan));
}

TEST(Executor, TakesRaggedMicrobatches) {
  for (const bool recompute : {false, true}) {
    const Task task{DType::f64, 6, {6, 2, 9, 1, 6, 2, 2}, recompute};
    const Outcome expected = alone(task);
    for (const int ranks : {2, 4})
      for (const Plan& plan : plans(ranks)) expect_equal(piped(task, plan, 2), expected, bounds::mesh(DType::f64), name(task, plan));  // shapes known in the second step
  }
}

TEST(Executor, EachPartHasTheRanksThatUseIt) {
  const Outcome o = piped({}, {ScheduleKind::one_f_one_b, 4, 1});
  for (const auto& [parameter, holders] : o.holders) EXPECT_EQ(holders, parameter == "middle1.w" ? 2 : 1) << parameter;
}

TEST(Executor, EvaluatesForwardAlone) {
  const Task task{DType::f64, 6, {6, 3, 6}, false};
  const auto device = make_cpu_device(1);
  Chain whole(task.middles);
  whole.place(*device, task.dtype);
  Outcome expected;
  Microbatches reference(task, *device, false);
  for (ForwardContext* c : reference.pointers) {
    run_forward(whole, *c, true);
    expected.add(c->losses());
  }
  expected.sort();
  for (const Plan& plan : plans(2)) {
    Outcome got;
    std::mutex mutex;
    const auto errors = on_ranks(2, 20, [&](World& world) {
      const auto pp = world.make("pp", {0, 1});
      const auto d = make_cpu_device(1);
      Chain model(task.middles);
      model.place(*d, task.dtype);
      Executor executor(model, *pp, plan, even_cut(model, plan.stages()));
      Microbatches trained(task, *d), micro(task, *d, false);
      executor.run(trained.pointers);  // shapes of training and of evaluation are told apart
      const auto losses = executor.evaluate(micro.pointers);
      for (const LossEntry& l : losses) EXPECT_FALSE(l.sum.requires_grad());
      const std::lock_guard lock(mutex);
      got.add(losses);
    });
    EXPECT_THAT(errors, Each(""));
    got.sort();
    EXPECT_EQ(got.losses, expected.losses) << name(task, plan);
  }
}

TEST(Executor, RunsATableOfOnesOwn) {
  const Task task{DType::f64, 4, {6, 6}, false};
  const Schedule table = with_communication(parse_schedule(
      "mine: 2 ranks, 2 stages, 2 microbatches\nrank 0: 0F0 0F1 0I0 0I1 0W1 0W0\nrank 1: 1F0 1F1 1I0 1B1 1W0\n"));
  Outcome got;
  std::mutex mutex;
  const auto errors = on_ranks(2, 20, [&](World& world) {
    const auto pp = world.make("pp", {0, 1});
    const auto device = make_cpu_device(1);
    Chain model(task.middles);
    model.place(*device, task.dtype);
    Executor executor(model, *pp, {ScheduleKind::one_f_one_b, 2, 1}, even_cut(model, 2));
    Microbatches micro(task, *device);
    const auto losses = executor.run(table, micro.pointers);
    const std::lock_guard lock(mutex);
    got.add(losses);
    got.add(model);
  });
  EXPECT_THAT(errors, Each(""));
  got.sort();
  expect_equal(got, alone(task), bounds::reordered(DType::f64), "own table", false);  // weight gradients add in another order
}

TEST(Executor, HooksHearOfThisRanksCallsAndTheirWeightPart) {
  const Task task{DType::f64, 4, {6, 6}, false};
  std::vector<std::vector<std::string>> told(2);
  const auto errors = on_ranks(2, 20, [&](World& world) {
    auto& mine = told[static_cast<std::size_t>(world.rank())];
    const auto pp = world.make("pp", {0, 1});
    const auto device = make_cpu_device(1);
    Chain model(task.middles);
    model.place(*device, task.dtype);
    WalkHooks hooks;
    hooks.before = [&](const Call& call, WalkStep::Kind step) {
      mine.push_back(std::string(1, "FBIW"[step]) + std::to_string(&call - model.calls().data()));
    };
    hooks.after = [&](const Call& call, WalkStep::Kind step) {
      mine.push_back(std::string(1, "fbiw"[step]) + std::to_string(&call - model.calls().data()));
    };
    Executor executor(model, *pp, {ScheduleKind::zero_bubble, 2, 1}, {0, 0, 0, 0, 1, 1});
    Microbatches micro(task, *device);
    executor.run(micro.pointers, hooks);
  });
  EXPECT_THAT(errors, Each(""));
  EXPECT_THAT(told[1], ElementsAre("F4", "f4", "F5", "f5", "I5", "i5", "I4", "i4",  // forward and input part of microbatch 0
                                   "F4", "f4", "F5", "f5", "I5", "i5", "I4", "i4",  // of 1
                                   "W5", "w5", "W4", "w4", "W5", "w5", "W4", "w4"));
  EXPECT_EQ(told[0].size(), 2u * 2 * 8);
  EXPECT_EQ(std::set<std::string>(told[0].begin(), told[0].end()).count("F4"), 0u);
}

TEST(Executor, HoldsNoMoreMicrobatchesThanTheTableSays) {
  // What a stage keeps of one microbatch, then what it keeps at most: 1f1b on the last rank holds one, gpipe all.
  const Task task{DType::f64, 6, std::vector<std::int64_t>(8, 64), false};
  std::map<ScheduleKind, std::int64_t> peak;
  for (const ScheduleKind kind : {ScheduleKind::gpipe, ScheduleKind::one_f_one_b}) {
    std::int64_t bytes = 0;
    const auto errors = on_ranks(2, 20, [&](World& world) {
      const auto pp = world.make("pp", {0, 1});
      const auto device = make_cpu_device(1);
      Chain model(task.middles);
      model.place(*device, task.dtype);
      Executor executor(model, *pp, {kind, 2, 1}, even_cut(model, 2));
      Microbatches micro(task, *device);
      executor.run(micro.pointers);
      const std::int64_t held = device->bytes_held();
      device->reset_peak();
      Microbatches again(task, *device);
      const std::int64_t batches = device->bytes_held() - held;
      executor.run(again.pointers);
      EXPECT_LE(device->bytes_held(), held + batches + 2048);  // scalars of the losses stay
      if (world.rank() == 1) bytes = device->bytes_peak() - held - batches;
    });
    EXPECT_THAT(errors, Each(""));
    peak[kind] = bytes;
  }
  EXPECT_GT(peak[ScheduleKind::gpipe], 3 * peak[ScheduleKind::one_f_one_b]);
}

TEST(Executor, StagesWorkAtTheSameTime) {
  // Stages that sleep, so that cores do not matter: all four are in a forward at once when the pipeline is full.
  for (const bool train : {false, true}) {
    std::atomic<int> inside{0}, most{0};
    const auto errors = on_ranks(4, 20, [&](World& world) {
      const auto pp = world.make("pp", {0, 1, 2, 3});
      const auto device = make_cpu_device(1);
      Chain model(4, [&](int, ForwardContext&) {
        const int now = ++inside;
        for (int before = most; before < now && !most.compare_exchange_weak(before, now);) continue;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        --inside;
      });
      model.place(*device, DType::f32);
      Executor executor(model, *pp, {ScheduleKind::gpipe, 4, 1}, {0, 0, 1, 2, 3, 3});
      Microbatches micro({DType::f32, 4, std::vector<std::int64_t>(12, 6), false}, *device, train);
      if (train) executor.run(micro.pointers);
      else executor.evaluate(micro.pointers);
    });
    EXPECT_THAT(errors, Each(""));
    EXPECT_EQ(most, 4) << (train ? "train" : "evaluate");
  }
}

TEST(Executor, ARankThatThrowsEndsTheOthersByName) {
  for (const Plan& plan : plans(4)) {
    const auto begin = std::chrono::steady_clock::now();
    const auto errors = on_ranks(4, 20, [&](World& world) {
      const auto pp = world.make("pp", {0, 1, 2, 3});
      const auto device = make_cpu_device(1);
      int forwards = 0;
      Chain model(6, [&](int middle, ForwardContext&) {
        if (world.rank() == 2 && middle > 0 && ++forwards == 3) fail(Fault::runtime, "test", "the third forward breaks");
      });
      model.place(*device, DType::f64);
      Executor executor(model, *pp, plan, even_cut(model, plan.stages()));
      Microbatches micro({DType::f64, 6, {6, 6, 6, 6, 6}, false}, *device);
      try {
        executor.run(micro.pointers);
      } catch (const Error& e) {
        world.fail_job(e.what());
        throw;
      }
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_LT(seconds, 10) << name_of(plan.kind);
    EXPECT_THAT(errors[2], HasSubstr("the third forward breaks"));
    for (const int r : {0, 1, 3}) EXPECT_THAT(errors[static_cast<std::size_t>(r)], AllOf(HasSubstr("rank 2"), HasSubstr("the third forward breaks"))) << r;
  }
}

TEST(Executor, ARankThatStaysAwayIsNamed) {
  const auto errors = on_ranks(2, 1, [&](World& world) {
    const auto pp = world.make("pp", {0, 1});
    if (world.rank() == 1) {
      std::this_thread::sleep_for(std::chrono::seconds(3));
      return;
    }
    const auto device = make_cpu_device(1);
    Chain model(2);
    model.place(*device, DType::f64);
    Executor executor(model, *pp, {ScheduleKind::one_f_one_b, 2, 1}, {0, 0, 1, 1});
    Microbatches micro({DType::f64, 2, {6}, false}, *device);
    executor.run(micro.pointers);
  });
  EXPECT_THAT(errors[0], HasSubstr("rank 1"));
}

TEST(Executor, ShapesThatDoNotFollowFromTheBatchAreRefused) {
  const auto errors = on_ranks(2, 5, [&](World& world) {
    const auto pp = world.make("pp", {0, 1});
    const auto device = make_cpu_device(1);
    int seen = 0;
    Chain model(2, [&](int middle, ForwardContext& c) {
      if (middle == 0 && ++seen == 2) c.set("skip", Tensor::zeros({3, width}, DType::f64, *device));
    });
    model.edit()[1].writes = {"h", "skip"};
    model.place(*device, DType::f64);
    Executor executor(model, *pp, {ScheduleKind::one_f_one_b, 2, 1}, {0, 0, 1, 1});
    Microbatches micro({DType::f64, 2, {6, 6}, false}, *device);
    executor.run(micro.pointers);
  });
  EXPECT_THAT(errors[0], AllOf(HasSubstr("'skip'"), HasSubstr("f64 [3, 8]"), HasSubstr("f64 [6, 8]")));
}

TEST(Executor, WhatDoesNotGoTogetherIsRefused) {
  const auto world = make_single_world();
  const auto pp = world->make("pp", {0});
  Chain model(2);
  const auto error = [&](const Plan& plan, std::vector<int> cut) {
    try {
      Executor(model, *pp, plan, std::move(cut));
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_THAT(error({ScheduleKind::gpipe, 2, 1}, {0, 0, 1, 1}), HasSubstr("for 2 ranks"));
  EXPECT_THAT(error({ScheduleKind::gpipe, 1, 2}, {0, 0, 1}), HasSubstr("each of 4 calls, got 3"));
  EXPECT_THAT(error({ScheduleKind::gpipe, 1, 2}, {0, 1, 0, 1}), HasSubstr("neighbouring"));
  EXPECT_THAT(error({ScheduleKind::gpipe, 1, 3}, {0, 0, 1, 1}), HasSubstr("expected 3 stages, got 2"));
  EXPECT_EQ(error({ScheduleKind::gpipe, 1, 2}, {0, 0, 1, 1}), "");
}

}  // namespace
}  // namespace capstan::pipeline
