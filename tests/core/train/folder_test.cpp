// The run's folder: whose it is, what resume allows, what it holds, and what a full disk does to it.
#include "checkpoint/saver.h"
#include "support.h"
#include "train/run_folder.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <tuple>

/// The errno that flock() fails with in this process; 0: it locks.
static int lock_error = 0;
/// Found ahead of the C library's, by the core's library too.
extern "C" __attribute__((visibility("default"))) int flock(int file, int operation) noexcept {
  if (lock_error == 0) return static_cast<int>(::syscall(SYS_flock, file, operation));
  errno = lock_error;
  return -1;
}

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(RunFolder, HoldsWhatTheRunLeaves) {
  Project project;
  const Exit exit = train(project.recipe(), {project.dir("elsewhere/deep"), "train.sample_every=10", "train.sample_tokens=8", "train.sample_prompt=the"});
  ASSERT_EQ(exit.code, 0) << exit.err;
  const fs::path run = project / "elsewhere/deep";
  EXPECT_FALSE(fs::exists(project / "run"));
  for (const char* name : {"recipe.yaml", "log.txt", "metrics.jsonl", "samples/step_000010.txt", "samples/step_000020.txt", "checkpoints/LATEST"})
    EXPECT_TRUE(fs::exists(run / name)) << name;
  EXPECT_THAT(read_file(run / "samples/step_000010.txt"), ::testing::StartsWith("the"));
  EXPECT_THAT(read_file(run / "log.txt"), AllOf(HasSubstr("started at step 0"), HasSubstr("done at step 20")));

  // The recipe that it keeps stands on its own: it trains the same to the bit.
  const Exit again = train((run / "recipe.yaml").string(), {project.dir("again")});
  ASSERT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(metrics(project / "again"), metrics(run));
  EXPECT_EQ(weights(project / "again", 20), weights(run, 20));
}

TEST(RunFolder, TheRecipeThatItKeepsGoesOnWithTheRun) {
  Project project;
  std::string text = read_file(project.recipe());
  text.erase(text.find(", dir: run"), 10);
  write_file(project / "plain.yaml", text);
  const auto here = [&] { ASSERT_EQ(::chdir((project / ".").c_str()), 0); };
  const Exit first = Child({"train", "plain.yaml", "train.steps=10"}, here).wait();
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_THAT(first.out, HasSubstr("try: capstan generate runs/plain "));
  EXPECT_THAT(read_file(project / "runs/plain/recipe.yaml"), HasSubstr("  dir: " + (project / "runs/plain").string() + "\n"));
  const Exit same = Child({"train", "runs/plain/recipe.yaml"}, here).wait();
  EXPECT_EQ(same.code, 0) << same.err;
  EXPECT_THAT(same.out, HasSubstr("at step 10 of 10"));
  EXPECT_THAT(read_file(project / "runs/plain/log.txt"), Not(HasSubstr("the recipe differs")));
  // A copy elsewhere too.
  fs::create_directory(project / "other");
  fs::copy_file(project / "runs/plain/recipe.yaml", project / "other/copy.yaml");
  const Exit more = Child({"train", "other/copy.yaml", "train.steps=12"}, here).wait();
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_TRUE(has_checkpoint(project / "runs/plain", 12));
  EXPECT_FALSE(fs::exists(project / "runs/recipe"));
  EXPECT_FALSE(fs::exists(project / "runs/copy"));
}

TEST(RunFolder, MetricsHaveTheDocumentedFields) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const auto lines = metrics_with(project / "run", "lr");
  ASSERT_EQ(lines.size(), 20u);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const auto& line = lines[i];
    EXPECT_EQ(line.size(), 9u) << line;
    EXPECT_EQ(line.at("step"), i + 1);
    EXPECT_EQ(line.at("tokens"), (i + 1) * 4 * 32);
    EXPECT_GT(line.at("seconds").get<double>(), 0);
    EXPECT_NEAR(line.at("tokens_per_second").get<double>() * line.at("seconds").get<double>(), 128, 1e-6);
    EXPECT_GT(line.at("flops").get<double>(), 0);
    // A share of what was measured once, at the start; other work on the machine may have held that measurement back.
    const auto peak = [](const auto& of) { return of.at("flops").template get<double>() / of.at("peak_share").template get<double>(); };
    EXPECT_GT(peak(line), 0);
    EXPECT_NEAR(peak(line) / peak(lines[0]), 1, 1e-6);
    EXPECT_GT(line.at("grad_norm").get<double>(), 0);
  }
  EXPECT_NEAR(lines[0].at("loss").get<double>(), std::log(256), 0.1);
  EXPECT_LT(lines[19].at("loss"), lines[0].at("loss"));
  EXPECT_NEAR(lines[4].at("lr").get<double>(), 3e-3, 1e-12);
  EXPECT_NEAR(lines[19].at("lr").get<double>(), 3e-4, 1e-12);
  for (const auto& line : metrics_with(project / "run", "validation_loss")) {
    EXPECT_EQ(line.size(), 4u) << line;
    EXPECT_EQ(line.at("event"), "validation");
    EXPECT_GT(line.at("bigram_loss").get<double>(), 0);
  }
  expect_documented_metrics(project / "run");
}

TEST(RunFolder, LogEveryThinsTheMetrics) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {"train.log_every=6"}).code, 0);
  std::vector<std::int64_t> steps;
  for (const auto& line : metrics_with(project / "run", "lr")) steps.push_back(line.at("step"));
  EXPECT_EQ(steps, (std::vector<std::int64_t>{6, 12, 18, 20}));
  EXPECT_EQ(metrics_with(project / "run", "validation_loss").size(), 4u);
}

TEST(RunFolder, MinutesBetweenCheckpoints) {
  Project project;
  const std::vector<std::string> words{"train.steps=6", "checkpoint.every_steps=0", "checkpoint.at_end=false", "checkpoint.keep=0"};
  auto with = [&](const char* minutes, const char* dir) {
    auto all = words;
    all.push_back(std::string("checkpoint.every_minutes=") + minutes);
    all.push_back(project.dir(dir));
    return train(project.recipe(), all);
  };
  ASSERT_EQ(with("0.0000001", "often").code, 0);
  for (int step = 1; step <= 6; ++step) EXPECT_TRUE(has_checkpoint(project / "often", step)) << step;
  ASSERT_EQ(with("100", "seldom").code, 0);
  for (int step = 1; step <= 6; ++step) EXPECT_FALSE(has_checkpoint(project / "seldom", step)) << step;
}

TEST(RunFolder, ResumeNeverAndRequire) {
  Project project;
  Exit exit = train(project.recipe(), {"run.resume=require"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("run.resume"), HasSubstr("no checkpoint to go on from")));
  // Refused before anything was made: neither a folder nor a data set.
  EXPECT_FALSE(fs::exists(project / "run"));
  EXPECT_FALSE(built_data(project));
  EXPECT_EQ(train(project.recipe(), {"run.resume=never"}).code, 0);
  EXPECT_TRUE(built_data(project));
  const auto before = weights(project / "run", 20);
  exit = train(project.recipe(), {"run.resume=never"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("run.resume"), HasSubstr("has checkpoints already"), HasSubstr("run.dir")));
  EXPECT_EQ(weights(project / "run", 20), before);
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 20u);
  EXPECT_EQ(train(project.recipe(), {"run.resume=require"}).code, 0);
}

TEST(RunFolder, WhatAKilledSaveLeftIsNoCheckpoint) {
  Project project;
  const fs::path rest = project / "run/checkpoints/step_000010.tmp-123-abc";
  write_file(rest / "shard_00000.h5", "half");
  Exit exit = train(project.recipe(), {"run.resume=require"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, HasSubstr("no checkpoint to go on from"));
  EXPECT_FALSE(built_data(project)) << "it was let through to the data";
  exit = train(project.recipe(), {"run.resume=never"});
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_FALSE(fs::exists(rest));
  // Set aside by a save that was killed before its own checkpoint had the name: the only one that there is.
  fs::remove_all(project / "run/checkpoints/step_000010");
  fs::rename(project / "run/checkpoints/step_000020", project / "run/checkpoints/step_000020.superseded");
  EXPECT_EQ(train(project.recipe(), {"run.resume=never"}).code, 2);
  exit = train(project.recipe(), {"run.resume=require"});
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.out, HasSubstr("at step 20 of 20"));
}

TEST(RunFolder, FewerStepsThanTheRunHasDoneAreRefused) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const std::string recipe = read_file(project / "run/recipe.yaml");
  const auto lines = metrics(project / "run");
  const Exit exit = train(project.recipe(), {"train.steps=4"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("train.steps"), HasSubstr("is at step 20 already"), HasSubstr("run.dir")));
  EXPECT_THAT(exit.out, Not(HasSubstr("resuming")));
  EXPECT_EQ(read_file(project / "run/recipe.yaml"), recipe);
  EXPECT_EQ(metrics(project / "run"), lines);
  const Exit same = train(project.recipe(), {});
  EXPECT_EQ(same.code, 0) << "all steps are done: nothing to do, and no error";
}

TEST(RunFolder, TheRecipeSoFarIsKeptOrTheRunStops) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const fs::path recipe = project / "run/recipe.yaml", kept = project / "run/recipe.until_000020.yaml";
  const std::string before = read_file(recipe);
  fs::create_directories(kept / "in the way");
  Exit exit = train(project.recipe(), {"train.steps=21"});
  EXPECT_EQ(exit.code, 1);
  EXPECT_THAT(exit.err, AllOf(HasSubstr(kept.string() + "] cannot be replaced"), HasSubstr("run.dir"), Not(HasSubstr("is kept as"))));
  EXPECT_EQ(read_file(recipe), before);
  fs::remove_all(kept);
  exit = train(project.recipe(), {"train.steps=21"});
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.err, HasSubstr("which is kept as " + kept.string()));
  EXPECT_EQ(read_file(kept), before);
  fs::remove(recipe);
  exit = train(project.recipe(), {"train.steps=22"});
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.err, AllOf(HasSubstr("the folder has lost its recipe.yaml"), Not(HasSubstr("is kept as"))));
  EXPECT_FALSE(fs::exists(project / "run/recipe.until_000021.yaml"));
}

TEST(RunFolder, AnotherSeedIsRefused) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const Exit exit = train(project.recipe(), {"run.seed=7"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("run.seed"), HasSubstr("was started with seed 1")));
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 20u);
}

TEST(RunFolder, ASecondTrainerIsRefused) {
  Project project;
  Child first({"train", project.recipe()});
  ASSERT_TRUE(first.read_until("step 3/20")) << first.wait().err;
  const Exit second = train(project.recipe(), {});
  EXPECT_EQ(second.code, 2);
  EXPECT_THAT(second.err, AllOf(HasSubstr((project / "run").string()), HasSubstr("another process is training")));
  EXPECT_EQ(first.wait().code, 0);
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 20u);
}

/// Never asked for anything.
class NoFormat : public CheckpointFormat {
 public:
  std::string_view name() const override { return "none"; }
  std::string_view extension() const override { return ".none"; }
  void write_shard(const std::string&, std::span<SavedTensor>, const std::function<void(std::int64_t)>&) override {}
  void read(const std::string&, const SavedTensor&, void*) override {}
  void write_index(const std::string&, std::span<const SavedTensor>) override {}
};

TEST(RunFolder, AFileSystemWithoutLocksIsNoSecondTrainer) {
  Project project;
  for (const int code : {ENOLCK, ENOSYS, EOPNOTSUPP}) {
    for (const char* what : {"run", "checkpoints"}) {
      const std::string folder = (project / what).string();
      lock_error = code;
      try {
        if (what == std::string("run")) RunFolder run(folder);
        else checkpoint::Saver saver(folder, std::make_shared<NoFormat>(), {});
        ADD_FAILURE() << what << " was locked";
      } catch (const Error& e) {
        EXPECT_EQ(e.fault(), Fault::input);
        EXPECT_THAT(e.what(), AllOf(HasSubstr(folder + "/.lock] cannot be locked: "), HasSubstr(std::strerror(code)), HasSubstr("file system with locks"),
                                    HasSubstr("run.dir"), Not(HasSubstr("another process"))));
      }
      lock_error = 0;
    }
  }
  const RunFolder first((project / "run").string());
  EXPECT_THROW(RunFolder((project / "run").string()), Error);
}

// As when the disk is full: the kernel refuses to make files of more than 64 KiB.
TEST(FailedSave, IsReportedAndTrainingGoesOn) {
  Project project;
  Child child({"train", project.recipe(), "checkpoint.every_steps=5", "checkpoint.keep=0", "checkpoint.asynchronous=false", "train.steps=40"},
              [] { std::signal(SIGXFSZ, SIG_IGN); });
  ASSERT_TRUE(child.read_until("step 6/40")) << child.wait().err;
  limit_files(child.pid(), 64 << 10);
  ASSERT_TRUE(child.read_until("step 21/40")) << child.wait().err;
  EXPECT_THAT(child.err(), AllOf(HasSubstr("a checkpoint could not be saved, which does not end the run: "), HasSubstr("step_000020")));
  limit_files(child.pid(), RLIM_INFINITY);
  const Exit exit = child.wait();
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_TRUE(has_checkpoint(project / "run", 5));
  EXPECT_FALSE(has_checkpoint(project / "run", 20));
  EXPECT_TRUE(has_checkpoint(project / "run", 40));
  EXPECT_TRUE(checkpoint::verify(project / "run/checkpoints/step_000005").empty());
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 40u);
  EXPECT_THAT(read_file(project / "run/log.txt"), HasSubstr("a checkpoint could not be saved, which does not end the run: "));
  ASSERT_EQ(train(project.recipe(), {project.dir("good"), "checkpoint.every_steps=5", "train.steps=40"}).code, 0);
  EXPECT_EQ(metrics(project / "run"), metrics(project / "good"));
}

TEST(RunFolder, ACheckpointThatCannotBeReadStopsTheRunAndStays) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const auto good = weights(project / "run", 20);
  const fs::path shard = project / "run/checkpoints/step_000020/shard_00000.h5", away = project / "away.h5";
  fs::rename(shard, away);
  fs::create_symlink(shard.filename(), shard);  // a link to itself, which nobody can open
  const Exit exit = train(project.recipe(), {"train.steps=30"});
  EXPECT_EQ(exit.code, 1);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("shard_00000.h5"), HasSubstr("step 20 may be good"), HasSubstr("nothing is replaced"), Not(HasSubstr("damaged"))));
  EXPECT_EQ(latest(project / "run"), 20);
  fs::remove(shard);
  fs::rename(away, shard);
  EXPECT_EQ(weights(project / "run", 20), good);
  EXPECT_EQ(train(project.recipe(), {"train.steps=30", "run.resume=require"}).code, 0);
}

TEST(RunFolder, MetricsThatCannotBeReadStopTheRunAndStay) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const fs::path file = project / "run/metrics.jsonl", away = project / "away.jsonl";
  const std::string recipe = read_file(project / "run/recipe.yaml"), lines = read_file(file);
  fs::rename(file, away);
  // A link to itself cannot be opened; the kernel opens this process's memory, whose page 0 is an I/O error to read.
  for (const auto& [link, code, why] : {std::tuple("metrics.jsonl", 2, "Too many levels of symbolic links"), std::tuple("/proc/self/mem", 1, "Input/output error")}) {
    fs::create_symlink(link, file);
    const Exit exit = train(project.recipe(), {"train.steps=30"});
    EXPECT_EQ(exit.code, code) << link;
    EXPECT_THAT(exit.err, AllOf(HasSubstr("run/metrics.jsonl] cannot be"), HasSubstr(why), HasSubstr("nothing is replaced"))) << link;
    EXPECT_TRUE(fs::is_symlink(file)) << link;
    EXPECT_EQ(read_file(project / "run/recipe.yaml"), recipe);
    EXPECT_EQ(latest(project / "run"), 20);
    fs::remove(file);
  }
  fs::rename(away, file);
  // Without the right to read it. Permissions do not stop root: for the while this process is nobody's.
  const uid_t me = ::geteuid();
  {
    RunFolder folder((project / "run").string());
    fs::permissions(project / ".", fs::perms(0755));
    fs::permissions(project / "run", fs::perms(0777));
    fs::permissions(file, fs::perms::none);
    if (me == 0) { ASSERT_EQ(::seteuid(65534), 0); }
    try {
      folder.rewind_metrics(20);
      ADD_FAILURE() << "it read what it may not read";
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input);
      EXPECT_THAT(e.what(), AllOf(HasSubstr("run/metrics.jsonl] cannot be opened: Permission denied"), HasSubstr("nothing is replaced")));
    }
    ASSERT_EQ(::seteuid(me), 0);
    fs::permissions(file, fs::perms(0644));
  }
  EXPECT_EQ(read_file(file), lines);
  EXPECT_EQ(train(project.recipe(), {"train.steps=30", "run.resume=require"}).code, 0);
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 30u);
}

TEST(RunFolder, CheckpointsThatCannotBeListedAreBadInput) {
  Project project;
  fs::create_directory(project / "run");
  fs::create_symlink("checkpoints", project / "run/checkpoints");  // a link to itself, which nobody can follow
  const Exit exit = train(project.recipe(), {"run.resume=never"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("run/checkpoints] cannot be listed: Too many levels of symbolic links"), Not(HasSubstr("filesystem error"))));
  EXPECT_FALSE(built_data(project));
}

TEST(FullDisk, CostsLinesOfMetricsAndNotTheRun) {
  Project project;
  Child child({"train", project.recipe(), "checkpoint.every_steps=0", "train.steps=40"});
  ASSERT_TRUE(child.read_until("step 6/40")) << child.wait().err;
  limit_files(child.pid(), 2000);  // some ten lines
  ASSERT_TRUE(child.read_until("step 30/40")) << child.wait().err;
  limit_files(child.pid(), RLIM_INFINITY);
  const Exit exit = child.wait();
  EXPECT_EQ(exit.code, 0) << exit.err;
  const std::string words = "run/metrics.jsonl] cannot be written, which does not end the run: File too large";
  EXPECT_THAT(exit.err, HasSubstr(words));
  EXPECT_EQ(exit.err.find(words, exit.err.find(words) + 1), std::string::npos) << "said more than once: " << exit.err;
  EXPECT_THAT(read_file(project / "run/log.txt"), AllOf(HasSubstr(words), HasSubstr("done at step 40")));
  const auto lines = metrics_with(project / "run", "lr");  // each is a whole one
  EXPECT_LT(lines.size(), 40u);
  EXPECT_GT(lines.size(), 5u);
  EXPECT_EQ(lines.back().at("step"), 40) << "later lines are not tried";
  EXPECT_TRUE(has_checkpoint(project / "run", 40));
}

// To the byte, whatever part of a line there was room for.
TEST(FullDisk, LeavesNoHalfLine) {
  std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t room : {0, 1, 9, 10}) {
    Project project;
    RunFolder folder((project / "run").string());
    folder.rewind_metrics(0);
    EXPECT_EQ(folder.metric(R"({"step":1})"), "");  // 11 bytes with the end of the line
    limit_files(::getpid(), 11 + room);
    EXPECT_THAT(folder.metric(R"({"step":2})"), HasSubstr("File too large"));
    EXPECT_EQ(folder.metric(R"({"step":3})"), "") << "said twice";
    limit_files(::getpid(), RLIM_INFINITY);
    EXPECT_EQ(read_file(project / "run/metrics.jsonl"), "{\"step\":1}\n");
    EXPECT_EQ(folder.metric(R"({"step":4})"), "");
    EXPECT_EQ(read_file(project / "run/metrics.jsonl"), "{\"step\":1}\n{\"step\":4}\n");
  }
}

class LastSave : public ::testing::TestWithParam<bool> {};

TEST_P(LastSave, ThatFailsIsAnError) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {project.dir("first"), "train.steps=1"}).code, 0);  // builds the data
  Child child({"train", project.recipe(), "checkpoint.every_steps=0", std::string("checkpoint.asynchronous=") + (GetParam() ? "true" : "false")},
              [] { std::signal(SIGXFSZ, SIG_IGN); });
  ASSERT_TRUE(child.read_until("step 1/20")) << child.wait().err;
  limit_files(child.pid(), 64 << 10);
  const Exit exit = child.wait();
  EXPECT_EQ(exit.code, 1);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("the last checkpoint could not be saved"), HasSubstr("earlier checkpoints are untouched"), Not(HasSubstr("goes on"))));
  EXPECT_THAT(exit.out, Not(HasSubstr("done:")));
}

INSTANTIATE_TEST_SUITE_P(Both, LastSave, ::testing::Bool(), [](const auto& info) { return std::string(info.param ? "asynchronous" : "synchronous"); });

// From the person's command to the end of the first step, in a run folder of its own, the data built before.
TEST(Start, ATinyModelHasDoneAStepWithinASecond) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {project.dir("first"), "train.steps=1"}).code, 0);
  double best = 1e9;
  for (int i = 0; i < 5 && best >= 1; ++i) {  // others may be using the machine
    const auto begin = std::chrono::steady_clock::now();
    Child child({"train", project.recipe(), project.dir("start" + std::to_string(i)), "run.threads=0"});
    ASSERT_TRUE(child.read_until("step 1/20")) << child.wait().err;
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::printf("start to the end of the first step: %.3f s\n", best);
  RecordProperty("seconds", std::to_string(best));
  EXPECT_LT(best, 1.0);
}

}  // namespace
}  // namespace capstan::train::testing
