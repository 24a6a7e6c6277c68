// Steps that are queued ahead of their results, and recorded: the same bits as those that the host waits for, whatever happens
// between them; and what cannot be recorded is refused.
#include "in_process.h"

#include <capstan/ops.h>
#include <capstan/optimizer.h>
#include <capstan/random.h>
#include <capstan/update.h>
#include <gmock/gmock.h>
#include <kernels/backend.h>
#include <kernels/queue.h>

#include <csignal>
#include <cstdio>
#include <limits>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

using Words = std::vector<std::string>;

Words on_gpu(const Project& project, const std::string& dir, const std::string& graphs, const Words& more = {}) {
  Words all{project.dir(dir), "run.device=cuda", "run.cuda_graphs=" + graphs};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

void expect_same(const Project& project, const std::string& a, const std::string& b, std::int64_t steps = 20) {
  EXPECT_EQ(metrics(project / a), metrics(project / b));
  EXPECT_EQ(weights(project / a, steps), weights(project / b, steps));
}

struct Case { const char* name; Words words; };

class Graphs : public ::testing::TestWithParam<Case> {};

// Dropout, accumulation over two microbatches, clipping, validation, checkpoints; documents of other lengths in each batch.
TEST_P(Graphs, GiveTheBitsOfUnrecordedSteps) {
  Project project;
  for (const char* graphs : {"off", "on"}) {
    const Outcome run = run_trainer(project.recipe(), on_gpu(project, graphs, graphs, GetParam().words));
    ASSERT_FALSE(run.error) << run.error->what();
    EXPECT_EQ(run.err, "");
    EXPECT_THAT(run.out, HasSubstr("cuda graphs"));
  }
  expect_same(project, "on", "off");
  EXPECT_NE(weights(project / "on", 10), weights(project / "on", 20));
  EXPECT_EQ(metrics_with(project / "on", "validation_loss").size(), 4u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Graphs,
                         ::testing::Values(Case{"f32", {}}, Case{"bf16", {"precision.compute=bf16"}},
                                           Case{"gpt2", {"model.norm=layer", "model.positions=learned", "model.activation=gelu", "model.bias=true", "model.tied=true"}},
                                           Case{"equal_lengths", {"data.attend_across_documents=true"}}, Case{"recompute", {"train.recompute=block"}},
                                           Case{"muon", {"optimizer.plugin=muon", "optimizer.lr=0.01"}},
                                           Case{"sgd", {"optimizer.plugin=sgd", "optimizer.lr=0.1"}},
                                           Case{"fp8", {"precision.compute=bf16", "precision.linear=fp8"}}),
                         [](const auto& info) { return std::string(info.param.name); });

/// Queued steps of one engine; two microbatches each.
class Steps {
 public:
  Steps(const Project& project, const std::string& graphs, const Words& more = {}, std::shared_ptr<Optimizer> optimizer = nullptr, const Poison::Change& change = {})
      : session_(open_session(project.recipe(), on_gpu(project, "unused", graphs, more), CAPSTAN_PROGRAM, Placement::gradients)) {
    if (change) session_->engine = std::make_unique<Engine>(std::make_shared<Poisoned>(session_->model, change), session_->device, session_->engine_options(true));
    if (!optimizer) optimizer = session_->host->make_as<Optimizer>(session_->options().plugin("optimizer"));
    session_->engine->attach(std::move(optimizer));
    session_->engine->initialize();
  }
  Engine& engine() { return *session_->engine; }
  Device& device() { return *session_->device; }
  void take(std::int64_t step) {
    const Rng rng(3, "tokens");
    std::vector<Batch> batches;
    for (int m = 0; m < 2; ++m) {
      std::vector<std::int32_t> tokens, targets, lengths{7, 25, 32};
      for (std::int64_t i = 0; i < 64; ++i) {
        const auto at = static_cast<std::uint64_t>((step * 2 + m) * 100 + i);
        tokens.push_back(static_cast<std::int32_t>(rng.below(at, 256))), targets.push_back(static_cast<std::int32_t>(rng.below(at + 1, 256)));
      }
      batches.push_back(make_batch(*session_->device, tokens, lengths, targets, {}, (step * 2 + m) * 64));
      batches.back().step_weight = 128;
    }
    const StepNumbers n = engine().collect(engine().queue_step(std::span<const Batch>(batches), step, 1.0 / static_cast<double>(step), 0.3));
    EXPECT_TRUE(n.updated);
  }

 private:
  std::unique_ptr<Session> session_;
};

// A weight in fp8 is made anew with each update, in its place: microbatches' records read it and make none.
TEST(QueuedSteps, QuantizeEachWeightOnceAStep) {
  Project project;
  Steps steps(project, "on", {"precision.compute=bf16", "precision.linear=fp8"});
  const auto quantized = [&](std::int64_t step) {
    steps.device().clear_ledger();
    steps.take(step);
    for (const OpRecord& r : steps.device().ledger())
      if (r.name == "quantize") return r.calls;
    return std::int64_t{0};
  };
  steps.device().record(true);
  const std::int64_t first = quantized(1), second = quantized(2), third = quantized(3);
  std::int64_t weights = 0;
  for (const Parameter* p : steps.engine().model().parameters()) weights += p->derived_bytes() > 0;
  EXPECT_EQ(weights, 8);
  // First: weights, what both microbatches multiply by them, and weights again once they are updated. Second: that is recorded,
  // the weights are there. Later: they alone, asked for ahead of the update's replay.
  EXPECT_EQ(first, weights + 2 * 2 * weights + weights);
  EXPECT_EQ(second, 2 * 2 * weights + weights);
  EXPECT_EQ(third, weights);
}

/// Without state, and obeys the gate.
class Stateless : public Optimizer {
 public:
  std::vector<StateDecl> state_of(const Parameter&) const override { return {}; }
  Atomicity atomicity(const Parameter&) const override { return Atomicity::element; }
  double peak_lr() const override { return 0.1; }
  bool gated() const override { return true; }
};

/// Takes a number to the GPU in its own way, or does more at every third step.
class OwnWay final : public Stateless {
 public:
  enum class Way { number, calls };
  explicit OwnWay(Way way) : way_(way) {}
  void update(const UpdateContext& context, std::span<UpdateItem> items) override {
    for (const UpdateItem& item : items) {
      const Tensor value = item.value.view(Dims{1, item.value.numel()}), grad = item.grad.view(value.shape());
      const Tensor scaled = way_ == Way::number ? ops::scale(grad, context.lr_scale) : grad;
      update::axpby(1, value, way_ == Way::number ? -0.1 : -0.1 * context.lr_scale, scaled, value);
      if (way_ == Way::calls && context.step % 3 == 0) update::axpby(0.999, value, 0, Tensor(), value);
    }
  }

 private:
  Way way_;
};

// Its numbers of another step would be replayed: seen before anything runs.
TEST(QueuedSteps, AnUpdateThatIsAnotherAtEachStepIsNotReplayed) {
  for (const OwnWay::Way way : {OwnWay::Way::number, OwnWay::Way::calls}) {
    Project project;
    std::vector<Values> ends;
    for (const char* graphs : {"off", "auto"}) {
      Steps steps(project, graphs, {}, std::make_shared<OwnWay>(way));
      for (std::int64_t step = 1; step <= 6; ++step) steps.take(step);
      ends.push_back(values_of(steps.engine()));
      EXPECT_THAT(steps.engine().queued()->why_not(), graphs[0] == 'o' ? ::testing::Matcher<std::string>("") : AllOf(HasSubstr("the optimizer's update"), HasSubstr("not the recorded one")));
      EXPECT_EQ(steps.engine().queued()->recorded(), graphs[0] == 'a' ? 2 : 0) << "microbatches still are";
    }
    EXPECT_EQ(ends[0], ends[1]);
    Steps steps(project, "on", {}, std::make_shared<OwnWay>(way));
    steps.take(1), steps.take(2);
    EXPECT_THROW(steps.take(3), Error);
  }
}

/// More than there is.
void take_too_much(Device& device) { Tensor::empty(Dims{std::int64_t{1} << 48}, DType::f32, device); }

/// Wants too much of it in the step when its update is recorded.
class Hungry final : public Stateless {
 public:
  explicit Hungry(bool hungry) : hungry_(hungry) {}
  void update(const UpdateContext& context, std::span<UpdateItem> items) override {
    for (const UpdateItem& item : items) {
      const Tensor value = item.value.view(Dims{1, item.value.numel()});
      const Tensor scaled = ops::scale(item.grad.view(value.shape()), 0.5);
      update::axpby(1, value, -0.1, scaled, value);
    }
    if (context.step == 2 && std::exchange(hungry_, false)) take_too_much(items[0].value.device());
  }

 private:
  bool hungry_;
};

// What the plain steps behind it run in would be less, by all that the record took until it failed.
TEST(QueuedSteps, ARecordThatFindsNoMemoryGivesBackWhatItTook) {
  Project project;
  std::vector<Values> ends;
  for (const char* graphs : {"off", "auto"}) {
    int calls = 0;  // each kind of microbatch unrecorded; the first recorded; then the other, which goes wrong
    Steps steps(project, graphs, {}, nullptr, [&](const Tensor& h, ForwardContext& context) {
      if (++calls == 4 && graphs[0] == 'a') take_too_much(context.device);
      return times(h, 1);
    });
    steps.take(1);
    const std::int64_t before = steps.device().bytes_reserved();
    for (std::int64_t step = 2; step <= 4; ++step) steps.take(step);
    ends.push_back(values_of(steps.engine()));
    if (graphs[0] == 'o') continue;
    EXPECT_THAT(steps.engine().queued()->why_not(), AllOf(HasSubstr("cannot allocate"), HasSubstr("for recorded steps"), HasSubstr("run.cuda_graphs=off")));
    EXPECT_EQ(steps.engine().queued()->recorded(), 0);
    EXPECT_EQ(steps.device().backend().queue()->record_bytes(), 0);
    EXPECT_EQ(steps.device().bytes_reserved(), before);
  }
  EXPECT_EQ(ends[0], ends[1]);
}

// Other records' memory stays: they are replayed.
TEST(QueuedSteps, AnUpdateThatFindsNoMemoryLeavesTheRecordsOfMicrobatches) {
  Project project;
  std::vector<Values> ends;
  for (const char* graphs : {"off", "auto"}) {
    Steps steps(project, graphs, {}, std::make_shared<Hungry>(graphs[0] == 'a'));
    for (std::int64_t step = 1; step <= 6; ++step) steps.take(step);
    ends.push_back(values_of(steps.engine()));
    if (graphs[0] == 'o') continue;
    EXPECT_THAT(steps.engine().queued()->why_not(), AllOf(HasSubstr("the optimizer's update"), HasSubstr("cannot allocate"), HasSubstr("run.cuda_graphs=off")));
    EXPECT_EQ(steps.engine().queued()->recorded(), 2);
    EXPECT_GT(steps.device().backend().queue()->record_bytes(), 0);
  }
  EXPECT_EQ(ends[0], ends[1]);
}

TEST(QueuedSteps, TheirMemoryIsNamedByWhatItIsForWhenNoneIsLeft) {
  Project project;
  Steps steps(project, "off");
  steps.take(1);
  std::string text;
  try {
    steps.device().allocate(std::int64_t{1} << 50);
  } catch (const Error& e) {
    text = e.what();
  }
  double weights = 0, gradients = 0, state = 0, rest = 0;
  const std::size_t at = text.find("(weights ");
  ASSERT_NE(at, std::string::npos) << text;
  ASSERT_EQ(std::sscanf(text.c_str() + at, "(weights %lf KiB, gradients %lf KiB, optimizer state %lf KiB, activations and the rest %lf KiB)", &weights, &gradients, &state, &rest), 4) << text;
  EXPECT_GT(weights, 0);
  EXPECT_EQ(gradients, weights);
  EXPECT_NEAR(state, 2 * weights, 1.5);
}

TEST(QueuedSteps, AreThoseThatTheHostWaitsFor) {
  Project project;
  std::vector<Values> ends;
  std::vector<double> losses[2], norms[2];
  for (const bool queued : {false, true}) {
    auto session = open_session(project.recipe(), on_gpu(project, "unused", "on"), CAPSTAN_PROGRAM, Placement::gradients);
    Engine& engine = *session->engine;
    engine.attach(session->host->make_as<Optimizer>(session->options().plugin("optimizer")));
    engine.initialize();
    const Rng rng(3, "tokens");
    for (std::int64_t step = 1; step <= 6; ++step) {
      std::vector<Batch> batches;
      for (int m = 0; m < 2; ++m) {
        std::vector<std::int32_t> tokens, targets, lengths = step % 3 == 0 ? std::vector<std::int32_t>{20, 1, 11, 32} : std::vector<std::int32_t>{7, 25, 32};
        for (std::int64_t i = 0; i < 64; ++i) {
          const auto at = static_cast<std::uint64_t>((step * 2 + m) * 100 + i);
          tokens.push_back(static_cast<std::int32_t>(rng.below(at, 256))), targets.push_back(i % 9 == step % 9 ? -1 : static_cast<std::int32_t>(rng.below(at + 1, 256)));
        }
        batches.push_back(make_batch(*session->device, tokens, lengths, targets, {}, (step * 2 + m) * 64));
        batches.back().step_weight = 112 + static_cast<double>(step);
      }
      if (queued) {
        const StepNumbers n = engine.collect(engine.queue_step(std::span<const Batch>(batches), step, 0.5, 0.3));
        EXPECT_TRUE(n.updated);
        losses[1].push_back(n.loss), norms[1].push_back(n.norm);
      } else {
        double loss = 0;
        for (const LossEntry& entry : engine.forward_backward(std::span<const Batch>(batches), static_cast<std::uint64_t>(step))) loss += entry.weight * entry.sum.item();
        const double norm = engine.gradient_norm();
        EXPECT_GT(norm, 0.3) << "clipping must act";
        engine.update(step, 0.5, norm, 0.3);
        losses[0].push_back(loss), norms[0].push_back(norm);
      }
    }
    if (queued) {
      EXPECT_EQ(engine.queued()->recorded(), 2);  // first and later microbatches: three sequences and four share a record
    }
    ends.push_back(values_of(engine));
  }
  EXPECT_EQ(losses[0], losses[1]);
  EXPECT_EQ(norms[0], norms[1]);
  EXPECT_EQ(ends[0], ends[1]);
}

// The kernels are told, in records too; by default sums have one order.
TEST(QueuedSteps, SumAttentionsGradientsInAnyOrderWhenAsked) {
  Project project;
  std::vector<Values> ends;
  bool emulated = false;
  for (const Words& words : {Words{}, Words{"run.attention_backward=ordered"}, Words{"run.attention_backward=free"}}) {
    Steps steps(project, "on", words);
    emulated = steps.device().describe().find("emulated") != std::string::npos;
    for (std::int64_t step = 1; step <= 4; ++step) steps.take(step);
    ends.push_back(values_of(steps.engine()));
  }
  EXPECT_EQ(ends[0], ends[1]);
  if (emulated) {
    EXPECT_NE(ends[0], ends[2]);  // a GPU's f32 kernels have one order either way
  }
}

TEST(Graphs, SayThatARunInAnyOrderIsNotRepeated) {
  Project project;
  Words half = on_gpu(project, "free", "on", {"run.attention_backward=free", "train.steps=4", "schedule.decay=constant"});
  const Outcome first = run_trainer(project.recipe(), half);
  ASSERT_FALSE(first.error) << first.error->what();
  EXPECT_THAT(first.out, HasSubstr("summed in any order"));
  half.push_back("train.steps=6");
  const Outcome rest = run_trainer(project.recipe(), half);
  ASSERT_FALSE(rest.error) << rest.error->what();
  EXPECT_THAT(rest.out, HasSubstr("at step 4 of 6, not to the bit (run.attention_backward: free)"));
  const Outcome cpu = run_trainer(project.recipe(), {project.dir("cpu"), "run.attention_backward=free", "train.steps=2"});
  ASSERT_FALSE(cpu.error) << cpu.error->what();
  EXPECT_THAT(cpu.out, HasSubstr("in one order, the CPU's only one"));
}

TEST(Graphs, GoOnFromACheckpointToTheBit) {
  Project project;
  const Words constant{"schedule.decay=constant", "checkpoint.every_steps=8"};
  ASSERT_FALSE(run_trainer(project.recipe(), on_gpu(project, "straight", "on", constant)).error);
  Words half = on_gpu(project, "resumed", "on", constant);
  half.push_back("train.steps=13");
  ASSERT_FALSE(run_trainer(project.recipe(), half).error);
  const Outcome rest = run_trainer(project.recipe(), on_gpu(project, "resumed", "on", constant));
  ASSERT_FALSE(rest.error) << rest.error->what();
  EXPECT_THAT(rest.out, HasSubstr("at step 13 of 20"));
  EXPECT_EQ(weights(project / "resumed", 20), weights(project / "straight", 20));
}

// The signal is seen while the next step is under way already.
TEST(QueuedSteps, StopAtASignalWithWhatWasAskedFor) {
  Project project;
  ASSERT_FALSE(run_trainer(project.recipe(), on_gpu(project, "straight", "on")).error);
  std::int64_t last = 0;
  {
    auto session = open_session(project.recipe(), on_gpu(project, "stopped", "on"), CAPSTAN_PROGRAM, Placement::gradients);
    int asked = 0;
    Trainer trainer(std::move(session), [&] { return ++asked == 7 ? SIGTERM : 0; });
    ::testing::internal::CaptureStdout();
    EXPECT_EQ(trainer.run(), SIGTERM);
    ::testing::internal::GetCapturedStdout();
    last = trainer.step();
  }
  EXPECT_GE(last, 6);
  EXPECT_LE(last, 8);
  EXPECT_EQ(latest(project / "stopped"), last);
  ASSERT_FALSE(run_trainer(project.recipe(), on_gpu(project, "stopped", "on")).error);
  expect_same(project, "stopped", "straight");
}

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Not recorded: the poison is chosen on the host.
TEST(QueuedSteps, NeverLetABadGradientReachTheWeights) {
  for (const std::string policy : {"stop", "skip", "rollback"}) {
    SCOPED_TRACE(policy);
    Project project;
    std::vector<Outcome> runs;
    for (const char* device : {"cuda", "cpu"}) {
      Words words{project.dir(device), std::string("run.device=") + device, "run.cuda_graphs=" + std::string(device[1] == 'u' ? "off" : "auto"),
                  "train.on_nonfinite=" + policy, "checkpoint.every_steps=5", "train.steps=12"};
      int bad = 0;  // a rollback gets to step 8 again, with other data
      runs.push_back(run_trainer(project.recipe(), words, [&](const Tensor& h, ForwardContext& context) {
        // Twice queued, twice in the plain way that tells what was wrong; the CPU has the plain way alone.
        const int most = device[1] == 'u' ? 4 : 2;
        return context.step == 8 && ++bad <= most ? times(h, nan) : h;
      }));
    }
    ASSERT_EQ(runs[0].error.has_value(), policy == "stop");
    if (policy == "stop") {
      EXPECT_THAT(runs[0].error->what(), AllOf(HasSubstr("step 8"), HasSubstr("the loss is not finite"), HasSubstr("the gradient of tokens.weight"), HasSubstr("the checkpoint of step 5")));
      EXPECT_STREQ(runs[0].error->what(), runs[1].error->what());
    }
    const auto steps = [&](const char* dir) {
      std::vector<std::pair<std::int64_t, bool>> all;
      for (const auto& line : metrics_with(project / dir, "lr")) all.emplace_back(line.at("step"), line.contains("skipped"));
      return all;
    };
    EXPECT_EQ(steps("cuda"), steps("cpu"));
    for (const auto& [name, bytes] : runs[0].last) {
      const auto* f = reinterpret_cast<const float*>(bytes.data());
      for (std::size_t i = 0; i < bytes.size() / sizeof(float); ++i) ASSERT_TRUE(std::isfinite(f[i])) << name;
    }
    if (policy == "stop") continue;
    const auto cursor = [&](const char* dir) { return nlohmann::json::parse(read_file(project / dir / "checkpoints/step_000012/state.json")).at("data_cursor"); };
    EXPECT_EQ(cursor("cuda"), cursor("cpu"));
  }
}

// A run that diverges under recorded steps ends as one under unrecorded ones does: at the same step, with the same words.
TEST(Graphs, StopWhereTheOthersStop) {
  Project project;
  std::vector<std::string> words;
  for (const char* graphs : {"on", "off"}) {
    const Outcome run = run_trainer(project.recipe(), on_gpu(project, graphs, graphs, {"optimizer.plugin=sgd", "optimizer.lr=1e18", "schedule.warmup=0", "train.clip=0"}));
    ASSERT_TRUE(run.error);
    words.push_back(run.error->what());
    EXPECT_THAT(words.back(), HasSubstr("nothing was updated"));
  }
  EXPECT_EQ(words[0], words[1]);
  EXPECT_EQ(metrics(project / "on"), metrics(project / "off"));
}

struct Refused { const char* name; const char* why; Poison::Change change; };

std::vector<Refused> refused() {
  auto kept = std::make_shared<Tensor>();
  return {{"HostValues", "a copy of host values to the GPU",
           [](const Tensor& h, ForwardContext& context) {
             const float one = 1;
             return ops::mul(h, Tensor::of(std::span<const float>(&one, 1), Dims{1, 1}, context.device));
           }},
          {"WaitingForAResult", "a copy to the host", [](const Tensor& h, ForwardContext&) { return ops::sum_all(h.detach()).item() < 1e30 ? h : times(h, 2); }},
          {"MemoryThatOutlives", "outlive it",
           [kept](const Tensor& h, ForwardContext&) {
             *kept = h.detach().clone();
             return h;
           }},
          {"MemoryFromBefore", "given back inside of it", [held = std::make_shared<Tensor>()](const Tensor& h, ForwardContext& context) {
             if (context.step == 1) *held = h.detach().clone();
             else *held = Tensor();
             return h;
           }},
          {"AnotherStepsDropout", "dropout with a step number", [](const Tensor& h, ForwardContext& context) {
             return ops::dropout(h, 0.5, Rng(1, "other", context.step + 1), context.batch.space().sample_ids);
           }}};
}

class CannotBeRecorded : public ::testing::TestWithParam<int> {};

TEST_P(CannotBeRecorded, IsAnErrorWhenAskedForAndSaidOtherwise) {
  const Words few{"train.steps=4", "data.micro_batch=0", "checkpoint.at_end=true", "data.attend_across_documents=true"};
  Project project;
  const Outcome on = run_trainer(project.recipe(), on_gpu(project, "on", "on", few), refused()[static_cast<std::size_t>(GetParam())].change);
  ASSERT_TRUE(on.error);
  EXPECT_THAT(on.error->what(), AllOf(HasSubstr("cannot be recorded"), HasSubstr(refused()[static_cast<std::size_t>(GetParam())].why), HasSubstr("run.cuda_graphs")));
  const Outcome automatic = run_trainer(project.recipe(), on_gpu(project, "auto", "auto", few), refused()[static_cast<std::size_t>(GetParam())].change);
  ASSERT_FALSE(automatic.error) << automatic.error->what();
  EXPECT_THAT(automatic.err, HasSubstr(refused()[static_cast<std::size_t>(GetParam())].why));
  const Outcome off = run_trainer(project.recipe(), on_gpu(project, "off", "off", few), refused()[static_cast<std::size_t>(GetParam())].change);
  ASSERT_FALSE(off.error) << off.error->what();
  expect_same(project, "auto", "off", 4);
}

INSTANTIATE_TEST_SUITE_P(Because, CannotBeRecorded, ::testing::Range(0, 5),
                         [](const auto& info) { return std::string(refused()[static_cast<std::size_t>(info.param)].name); });

// The inverse: what a block takes from the host while it is recorded stays in the record, and the comparison sees it.
TEST(Graphs, AValueThatIsBakedInIsSeen) {
  Project project;
  const auto baked = [](const Tensor& h, ForwardContext& context) { return times(h, 1 + 0.01 * static_cast<double>(context.step)); };
  for (const char* graphs : {"on", "off"}) ASSERT_FALSE(run_trainer(project.recipe(), on_gpu(project, graphs, graphs, {"train.steps=6"}), baked).error);
  EXPECT_NE(metrics(project / "on"), metrics(project / "off"));
}

TEST(Graphs, AreRefusedWhereThereIsNoGpuToRecord) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), {project.dir("cpu"), "run.cuda_graphs=on"});
  ASSERT_TRUE(run.error);
  EXPECT_EQ(run.error->fault(), Fault::input);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("run.cuda_graphs"), HasSubstr("not on a GPU")));
}

}  // namespace
}  // namespace capstan::train::testing
