// A loss or gradient that is not finite never reaches the weights; what happens then is the recipe's choice. Losses
// that jump are reported.
#include "in_process.h"

#include <capstan/ops.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <limits>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Sample 30 is in step 8: steps hold four samples.
Tensor bad_sample(const Tensor& h, ForwardContext& context) { return holds_sample(context, 30) ? times(h, nan) : h; }

std::vector<std::string> words(const Project& project, const std::string& policy) {
  return {project.dir("run"), "train.on_nonfinite=" + policy, "checkpoint.every_steps=5", "train.steps=12"};
}

std::vector<std::int64_t> steps_of(const std::vector<nlohmann::json>& lines) {
  std::vector<std::int64_t> all;
  for (const auto& line : lines) all.push_back(line.at("step"));
  return all;
}

TEST(NonFinite, StopLeavesTheWeightsAndTheCheckpoint) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "stop"), bad_sample);
  ASSERT_TRUE(run.error);
  EXPECT_EQ(run.error->fault(), Fault::runtime);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("step 8"), HasSubstr("the loss is not finite"), HasSubstr("the gradient of tokens.weight"), HasSubstr("the checkpoint of step 5"),
                                       HasSubstr("optimizer.lr"), HasSubstr("train.on_nonfinite")));
  ASSERT_EQ(run.after_step.size(), 7u);
  EXPECT_EQ(run.last, run.after_step.back());
  EXPECT_NE(run.after_step[6], run.after_step[5]);
  EXPECT_TRUE(has_checkpoint(project / "run", 5));
  EXPECT_TRUE(checkpoint::verify(project / "run/checkpoints/step_000005").empty());
  EXPECT_THAT(read_file(project / "run/log.txt"), HasSubstr("step 8"));
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 7u);
}

// The save of step 7 fails as on a full disk, whenever that is heard of: the run ends, though not for it.
TEST(NonFinite, StopBehindAFailedSaveDoesNotSayThatTheRunGoesOn) {
  Project project;
  std::signal(SIGXFSZ, SIG_IGN);
  const Outcome run = run_trainer(project.recipe(), {project.dir("run"), "checkpoint.every_steps=7", "train.steps=12"}, [](const Tensor& h, ForwardContext& context) {
    if (holds_sample(context, 26)) limit_files(::getpid(), 64 << 10);  // of step 7
    return bad_sample(h, context);
  });
  limit_files(::getpid(), RLIM_INFINITY);
  ASSERT_TRUE(run.error);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("step 8"), HasSubstr("nothing was updated"), Not(HasSubstr("is good"))));
  EXPECT_THAT(run.err, AllOf(HasSubstr("a checkpoint could not be saved, which does not end the run: "), HasSubstr("step_000007"), Not(HasSubstr("goes on"))));
  EXPECT_FALSE(has_checkpoint(project / "run", 7));
}

TEST(NonFinite, SkipLeavesTheStepOut) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "skip"), bad_sample);
  ASSERT_FALSE(run.error) << run.error->what();
  ASSERT_EQ(run.after_step.size(), 12u);
  EXPECT_EQ(run.after_step[7], run.after_step[6]);
  EXPECT_NE(run.after_step[8], run.after_step[7]);
  EXPECT_THAT(run.err, AllOf(HasSubstr("step 8"), HasSubstr("skipped")));
  const auto lines = metrics_with(project / "run", "lr");
  ASSERT_EQ(lines.size(), 12u);
  EXPECT_EQ(lines[7].at("skipped"), true);
  EXPECT_EQ(lines[7].at("loss"), "nan");
  EXPECT_EQ(lines[7].at("tokens"), lines[6].at("tokens"));
  EXPECT_FALSE(lines[8].contains("skipped"));
  EXPECT_EQ(lines[11].at("tokens"), 11 * 4 * 32);
  EXPECT_EQ(latest(project / "run"), 12);
}

TEST(NonFinite, RollbackReturnsToTheCheckpointAndPassesTheBatch) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "rollback"), bad_sample);
  ASSERT_FALSE(run.error) << run.error->what();
  EXPECT_THAT(run.err, AllOf(HasSubstr("step 8"), HasSubstr("rolled back to step 5")));
  EXPECT_THAT(run.steps, ElementsAre(1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12));
  EXPECT_EQ(run.after_step[7], run.after_step[4]);  // the checkpoint's values, optimizer state included
  EXPECT_NE(run.after_step[8], run.after_step[5]);  // other data than the first time
  EXPECT_THAT(steps_of(metrics_with(project / "run", "lr")), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12));
  EXPECT_THAT(steps_of(metrics_with(project / "run", "validation_loss")), ElementsAre(5, 10, 12));
  const auto state = nlohmann::json::parse(read_file(project / "run/checkpoints/step_000012/state.json"));
  EXPECT_EQ(state.at("data_cursor").at("sample"), 8 * 4 + 7 * 4);  // eight steps, then seven from there on
}

// As on a full disk: no new file can be written where the metrics would be written anew.
TEST(NonFinite, RollbackNeedsNoRoomForMetrics) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "rollback"), [&](const Tensor& h, ForwardContext& context) {
    if (holds_sample(context, 30)) fs::create_directories(project / "run/metrics.jsonl.tmp");
    return bad_sample(h, context);
  });
  ASSERT_FALSE(run.error) << run.error->what();
  EXPECT_THAT(run.err, HasSubstr("rolled back to step 5"));
  EXPECT_THAT(steps_of(metrics_with(project / "run", "lr")), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12));
}

TEST(NonFinite, RollbackGoesOnWhereMetricsCannotBeRewritten) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "rollback"), [&](const Tensor& h, ForwardContext& context) {
    if (holds_sample(context, 30)) {
      fs::create_directories(project / "run/metrics.jsonl.tmp");
      const std::string text = read_file(project / "run/metrics.jsonl"), last = text.substr(text.rfind('\n', text.size() - 2) + 1);
      write_file(project / "run/metrics.jsonl", last + text);  // somebody has edited it
    }
    return bad_sample(h, context);
  });
  ASSERT_FALSE(run.error) << run.error->what();
  const std::string words = "metrics.jsonl keeps its lines of steps after 5, which are taken again, and this does not end the run";
  EXPECT_THAT(run.err, AllOf(HasSubstr("metrics.jsonl.tmp] cannot write: Is a directory"), HasSubstr(words), HasSubstr("rolled back to step 5")));
  EXPECT_THAT(read_file(project / "run/log.txt"), HasSubstr(words));
  EXPECT_THAT(steps_of(metrics_with(project / "run", "lr")), ElementsAre(7, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12));
  EXPECT_EQ(latest(project / "run"), 12);
}

std::int64_t times_in(const std::string& text, const std::string& words) {
  std::int64_t n = 0;
  for (auto at = text.find(words); at != std::string::npos; at = text.find(words, at + 1)) ++n;
  return n;
}

// The save of step 7 fails as on a full disk while step 8 is made: what it was is said ahead of the return to step 6.
TEST(NonFinite, RollbackBehindAFailedSaveSaysThatItWasNotSaved) {
  Project project;
  std::signal(SIGXFSZ, SIG_IGN);
  const Outcome run = run_trainer(project.recipe(), {project.dir("run"), "train.on_nonfinite=rollback", "checkpoint.every_steps=1", "checkpoint.keep=0", "train.steps=9"},
                                  [&](const Tensor& h, ForwardContext& context) {
                                    if (holds_sample(context, 26)) {  // of step 7
                                      EXPECT_TRUE(wait_for([&] { return latest(project / "run") == 6; }));
                                      limit_files(::getpid(), 64 << 10);
                                    }
                                    return bad_sample(h, context);
                                  });
  limit_files(::getpid(), RLIM_INFINITY);
  EXPECT_THAT(run.err, HasSubstr("rolled back to step 6"));
  EXPECT_GT(times_in(run.err, "[checkpoint of step 7] not saved"), 0);
  EXPECT_EQ(times_in(run.err, "[checkpoint of step 7] not saved"), times_in(run.err, "could not be saved, which does not end the run: [checkpoint of step 7] not saved"));
}

TEST(NonFinite, RollbackWithoutACheckpointSaysSo) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), {project.dir("run"), "train.on_nonfinite=rollback", "checkpoint.every_steps=10"}, bad_sample);
  ASSERT_TRUE(run.error);
  EXPECT_EQ(run.error->fault(), Fault::runtime);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("step 8"), HasSubstr("no checkpoint to roll back to"), HasSubstr("checkpoint.every_steps")));
}

TEST(NonFinite, TenInARowStopTheRun) {
  Project project;
  int forwards = 0;
  const Outcome run = run_trainer(project.recipe(), words(project, "skip"), [&](const Tensor& h, ForwardContext& context) {
    if (context.step <= 2) return h;
    ++forwards;
    return times(h, nan);
  });
  ASSERT_TRUE(run.error);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("step 12"), HasSubstr("the tenth bad step in a row, too many for train.on_nonfinite=skip"), HasSubstr("optimizer.lr"), Not(HasSubstr("go on past"))));
  EXPECT_EQ(forwards, 10 * 2);  // two microbatches
  EXPECT_EQ(run.last, run.after_step[1]);
}

// A run that diverges by itself gets to the same step again and again: finite steps on the way do not count.
TEST(NonFinite, RollbacksThatLeadNowhereStopTheRun) {
  Project project;
  int tries = 0;
  const Outcome run = run_trainer(project.recipe(), words(project, "rollback"), [&](const Tensor& h, ForwardContext& context) {
    if (context.step != 8) return h;
    if (++tries > 60) fail(Fault::programming, "test", "it never gives up");
    return times(h, nan);
  });
  ASSERT_TRUE(run.error);
  EXPECT_THAT(run.error->what(), HasSubstr("step 8"));
  EXPECT_EQ(tries, 10 * 2);
}

// sqrt has no slope at zero: the forward is h + 0 and the backward 0 / 0.
TEST(NonFinite, AGradientAloneIsCaughtToo) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), words(project, "stop"), [](const Tensor& h, ForwardContext& context) {
    if (context.step != 3) return h;
    return ops::add(h, ops::scale(ops::sqrt(ops::scale(h, 0)), 0));
  });
  ASSERT_TRUE(run.error);
  EXPECT_THAT(run.error->what(), AllOf(HasSubstr("step 3"), HasSubstr("the loss is finite"), HasSubstr("the gradient of ")));
  ASSERT_EQ(run.after_step.size(), 2u);
  EXPECT_EQ(run.last, run.after_step[1]);
}

TEST(NonFinite, ALearningRateWithoutMeasureEndsTheProgramWithOne) {
  Project project;
  const Exit exit = train(project.recipe(), {"optimizer.lr=1e30", "schedule.warmup=0"});
  EXPECT_EQ(exit.code, 1);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("is not; nothing was updated"), HasSubstr("optimizer.lr"), Not(HasSubstr("the checkpoint of"))));
}

TEST(LossSpike, IsReportedWhenAskedFor) {
  for (const bool asked : {true, false}) {
    Project project;
    std::vector<std::string> w{project.dir("run"), "train.steps=30", "optimizer.lr=1e-6"};
    if (asked) w.push_back("train.spike_threshold=6");
    const Outcome run = run_trainer(project.recipe(), w, [](const Tensor& h, ForwardContext& context) {
      if (context.step == 25) context.loss("test", Tensor::full({}, 1, DType::f32, context.device), 1);
      return h;
    });
    ASSERT_FALSE(run.error) << run.error->what();
    const auto spikes = metrics_with(project / "run", "deviations");
    if (!asked) {
      EXPECT_TRUE(spikes.empty());
      EXPECT_THAT(run.err, Not(HasSubstr("standard deviations")));
      continue;
    }
    ASSERT_EQ(spikes.size(), 1u);
    EXPECT_EQ(spikes[0].at("step"), 25);
    EXPECT_EQ(spikes[0].at("event"), "loss_spike");
    EXPECT_EQ(spikes[0].size(), 5u) << spikes[0];
    expect_documented_metrics(project / "run");
    EXPECT_GT(spikes[0].at("deviations").get<double>(), 6);
    EXPECT_THAT(run.err, AllOf(HasSubstr("step 25"), HasSubstr("standard deviations"), HasSubstr("sample 100")));
    EXPECT_THAT(read_file(project / "run/log.txt"), HasSubstr("step 25: loss"));
  }
}

// The running mean is part of a checkpoint: a run that goes on judges the next steps as the straight one does.
TEST(LossSpike, IsMeasuredByTheSameMeanAfterAResume) {
  Project project;
  const auto spike = [](const Tensor& h, ForwardContext& context) {
    if (context.step == 25) context.loss("test", Tensor::full({}, 1, DType::f32, context.device), 1);
    return h;
  };
  const auto run = [&](const char* dir, const char* steps) {
    const Outcome outcome = run_trainer(project.recipe(), {project.dir(dir), std::string("train.steps=") + steps, "schedule.decay=constant", "optimizer.lr=1e-6", "train.spike_threshold=6"}, spike);
    EXPECT_FALSE(outcome.error) << outcome.error->what();
  };
  run("straight", "26");
  run("resumed", "22");
  run("resumed", "26");
  EXPECT_EQ(metrics_with(project / "straight", "deviations").size(), 1u);
  EXPECT_EQ(metrics_with(project / "resumed", "deviations"), metrics_with(project / "straight", "deviations"));
}

}  // namespace
}  // namespace capstan::train::testing
