// The program over several ranks: one stream of words, faults that end the job with one message, restarts that finish it.
#include "core/train/support.h"
#include "forked.h"

#include <gmock/gmock.h>
#include <support/tolerance.h>

#include <chrono>
#include <csignal>

namespace capstan::launch {
namespace {

using namespace capstan::train::testing;  // Project, Child, metrics ...
using capstan::testing::Forked;
using std::chrono::steady_clock;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

double seconds_since(steady_clock::time_point t) { return std::chrono::duration<double>(steady_clock::now() - t).count(); }

int count(const std::string& text, const std::string& what) {
  int n = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

/// What each step came to, without clocks.
std::vector<std::string> steps_of(const fs::path& run) {
  std::vector<std::string> all;
  for (const std::string& line : metrics(run))
    if (line.find("\"loss\"") != std::string::npos) all.push_back(line);
  EXPECT_EQ(all.size(), 10u) << run;
  return all;
}

/// The training tests' project with ten short steps, a checkpoint every second one, and the optimizer that may have an
/// accident.
class Ranks : public ::testing::Test {
 protected:
  std::vector<std::string> words(const std::string& run, std::vector<std::string> more = {}) const {
    std::vector<std::string> all{project_.recipe(),
                                 project_.dir(run),
                                 "train.steps=10",
                                 "checkpoint.every_steps=2",
                                 "checkpoint.asynchronous=false",
                                 "mesh.timeout_seconds=20",
                                 "train.validate_every=0",
                                 std::string("optimizer={plugin: ") + CAPSTAN_FAULTY + "}"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::vector<std::string> accident(const std::string& fault, int rank, int step, const std::string& run) const {
    return {"optimizer.fault=" + fault, "optimizer.rank=" + std::to_string(rank), "optimizer.step=" + std::to_string(step),
            "optimizer.once=" + (project_ / ("happened_" + run)).string()};
  }
  Exit train_on(int ranks, const std::vector<std::string>& recipe_words) const {
    std::vector<std::string> all{"train", "--ranks", std::to_string(ranks)};
    all.insert(all.end(), recipe_words.begin(), recipe_words.end());
    return Child(all).wait();
  }
  Exit launch_on(int ranks, int restarts, const std::vector<std::string>& recipe_words) const {
    std::vector<std::string> all{
        "launch", "--ranks", std::to_string(ranks), "--max-restarts", std::to_string(restarts), "--backoff", "0.1",
        "--",     "train"};
    all.insert(all.end(), recipe_words.begin(), recipe_words.end());
    return Child(all).wait();
  }

  Project project_;
};

TEST_F(Ranks, OneStreamAndALogForEachRank) {
  // Five sequences for two ranks: microbatches of three, and still the same ten in each validation.
  const std::vector<std::string> set{"train.validate_every=4", "data.batch_size=5", "data.micro_batch=0"};
  const Exit two = train_on(2, words("two", set));
  ASSERT_EQ(two.code, 0) << two.err << two.out;
  EXPECT_EQ(count(two.out, "2 ranks, started by mpirun"), 1) << two.out;
  EXPECT_EQ(count(two.out, "capstan train "), 1) << two.out;
  EXPECT_EQ(count(two.out, "step 10/10"), 1) << two.out;
  EXPECT_EQ(count(two.out, "done: 10 steps"), 1) << two.out;
  EXPECT_THAT(two.out, Not(HasSubstr("\x1b")));  // no terminal here, whatever mpirun gives its ranks
  EXPECT_EQ(two.err, "");
  EXPECT_THAT(read_file(project_ / "two" / "log.txt"), HasSubstr("done at step 10"));
  EXPECT_THAT(read_file(project_ / "two" / "ranks" / "rank_00001.log"), HasSubstr("done at step 10"));
  const auto told = metrics_with(project_ / "two", "collectives");
  ASSERT_EQ(told.size(), 1u);
  EXPECT_EQ(told[0].size(), 5u) << told[0];
  EXPECT_EQ(told[0].at("event"), "communication");
  EXPECT_EQ(told[0].at("steps"), 10);
  EXPECT_GT(told[0].at("step_seconds").get<double>(), 0);
  ASSERT_GT(told[0].at("collectives").size(), 0u);
  for (const auto& c : told[0].at("collectives")) {
    EXPECT_EQ(c.size(), 6u) << c;
    EXPECT_GT(c.at("calls").get<int>(), 0) << c;
    EXPECT_GE(c.at("bytes").get<double>(), 0) << c;
    EXPECT_GE(c.at("seconds").get<double>(), 0) << c;
    EXPECT_GE(c.at("waited").get<double>(), 0) << c;
  }
  expect_documented_metrics(project_ / "two");
  // Two ranks train what one does.
  const Exit one = train_on(1, words("one", set));
  ASSERT_EQ(one.code, 0) << one.err;
  const auto v = metrics_with(project_ / "two", "validation_loss"), w = metrics_with(project_ / "one", "validation_loss");
  ASSERT_EQ(v.size(), 3u);
  ASSERT_EQ(w.size(), 3u);
  for (std::size_t i = 0; i < v.size(); ++i) {
    EXPECT_NEAR(v[i]["validation_loss"].get<double>(), w[i]["validation_loss"].get<double>(), bounds::curve(DType::f32));
    EXPECT_EQ(v[i]["bigram_loss"], w[i]["bigram_loss"]);
  }
  const auto a = metrics_with(project_ / "two", "loss"), b = metrics_with(project_ / "one", "loss");
  ASSERT_EQ(a.size(), 10u);
  ASSERT_EQ(b.size(), 10u);
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i]["loss"].get<double>(), b[i]["loss"].get<double>(), bounds::curve(DType::f32));
}

TEST_F(Ranks, BadInputIsToldOnce) {
  const Exit unknown = train_on(2, words("run", {"mesh.tensors=2"}));
  EXPECT_EQ(unknown.code, 2);
  EXPECT_EQ(count(unknown.err, "unknown key 'tensors'"), 1) << unknown.err;
  const Exit misfit = train_on(2, words("run", {"mesh.tensor=3"}));
  EXPECT_EQ(misfit.code, 2);
  EXPECT_EQ(count(misfit.err, "[command line, mesh.tensor] tensor 3 (3 ranks) does not divide the job's 2 ranks"), 1)
      << misfit.err;
  EXPECT_EQ(count(misfit.err, "capstan: "), 1) << misfit.err;
  const Exit restarted = launch_on(2, 5, words("run", {"mesh.tensor=3"}));
  EXPECT_EQ(restarted.code, 2);
  EXPECT_THAT(restarted.err, Not(HasSubstr("restart")));
}

TEST_F(Ranks, ARunOfSeveralRanksWritesTextOnOne) {
  for (const char* axis : {"tensor", "shard", "pp", "context"}) {
    const Exit trained = train_on(2, words(axis, {"train.steps=2", std::string("mesh.") + axis + "=2"}));
    ASSERT_EQ(trained.code, 0) << axis << ": " << trained.err;
    const Exit text = Child({"generate", (project_ / axis).string(), "--prompt", "the", "--max-tokens", "4"}).wait();
    EXPECT_EQ(text.code, 0) << axis << ": " << text.err;
    EXPECT_THAT(text.out, StartsWith("the")) << axis;
    EXPECT_THAT(text.err, HasSubstr("weights of step 2")) << axis;
  }
}

struct Accident {
  const char* fault;
  int rank;
  const char* said;
};

class Accidents : public Ranks, public ::testing::WithParamInterface<Accident> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Accidents,
                         ::testing::Values(Accident{"kill", 1, "is gone (killed or crashed)"},
                                           Accident{"stop", 1, "is stopped"},
                                           Accident{"throw", 1, "the optimizer had an accident"},
                                           Accident{"kill", 0, "is gone (killed or crashed)"},
                                           Accident{"throw", 0, "the optimizer had an accident"}),
                         [](const auto& info) {
                           return std::string(info.param.fault) + "_rank" + std::to_string(info.param.rank);
                         });

TEST_P(Accidents, EndTheJobInTimeWithOneMessage) {
  // A stopped rank is one that may yet come: it is waited for. A dead one and one that throws are noticed at once.
  const bool waited = std::string(GetParam().fault) == "stop";
  std::vector<std::string> all{"train", "--ranks", waited ? "2" : "3"};
  for (const std::string& word : words("run", accident(GetParam().fault, GetParam().rank, 5, "run"))) all.push_back(word);
  if (waited) all.push_back("mesh.timeout_seconds=3");
  Child job(all);
  ASSERT_TRUE(job.read_until("step 4/10")) << job.err();
  const auto broken = steady_clock::now();
  const Exit exit = job.wait();
  EXPECT_LT(seconds_since(broken), waited ? 3 + 10 : 10);
  EXPECT_EQ(exit.code, 1) << exit.err;
  EXPECT_EQ(count(exit.err, "\n"), 1) << exit.err;
  EXPECT_THAT(exit.err, AllOf(StartsWith("capstan: [rank " + std::to_string(GetParam().rank) + "] "), HasSubstr("step 5"),
                              HasSubstr(GetParam().said), HasSubstr("expected in "), HasSubstr(" of communicator '")));
  EXPECT_EQ(latest(project_ / "run"), 4);
}

TEST_F(Ranks, ARestartFinishesTheRunBitForBit) {
  const Exit whole = train_on(2, words("whole"));
  ASSERT_EQ(whole.code, 0) << whole.err;
  for (const Accident& a : {Accident{"kill", 1, ""}, Accident{"stop", 1, ""}, Accident{"throw", 0, ""}}) {
    const std::string run = std::string("broken_") + a.fault;
    std::vector<std::string> all = words(run, accident(a.fault, a.rank, 6, run));
    if (run == "broken_stop") all.push_back("mesh.timeout_seconds=3");
    const Exit broken = launch_on(2, 2, all);
    ASSERT_EQ(broken.code, 0) << broken.err;
    EXPECT_EQ(count(broken.err, "\n"), 1) << broken.err;
    EXPECT_THAT(broken.err,
                AllOf(StartsWith("capstan launch: [rank " + std::to_string(a.rank) + "] "), HasSubstr("step 6"),
                      HasSubstr(" of communicator '"), HasSubstr("starting again from the newest good checkpoint"),
                      HasSubstr("(restart 1 of 2)")));
    EXPECT_THAT(broken.out, ContainsRegex("resuming .* at step 4 of 10"));
    EXPECT_EQ(steps_of(project_ / run), steps_of(project_ / "whole"));
    const auto got = weights(project_ / run, 10);
    EXPECT_FALSE(got.empty());
    EXPECT_EQ(got, weights(project_ / "whole", 10));
  }
}

TEST_F(Ranks, ASignalSavesAndTheSameCommandGoesOn) {
  const Exit whole = train_on(2, words("whole"));
  ASSERT_EQ(whole.code, 0) << whole.err;
  for (const int signal : {SIGINT, SIGTERM}) {
    const std::string run = "run" + std::to_string(signal);
    std::vector<std::string> all{"train", "--ranks", "2"};
    for (const std::string& word : words(run)) all.push_back(word);
    Child job(all);
    ASSERT_TRUE(job.read_until("step 1/10")) << job.err();
    job.signal(signal);
    const Exit stopped = job.wait();
    EXPECT_EQ(stopped.code, 1) << stopped.err;
    EXPECT_THAT(stopped.out, HasSubstr(signal == SIGINT ? "stopped by SIGINT after step" : "stopped by SIGTERM after step"));
    EXPECT_LT(latest(project_ / run), 10);
    EXPECT_EQ(train_on(2, words(run)).code, 0);
    EXPECT_EQ(steps_of(project_ / run), steps_of(project_ / "whole"));
  }
}

// A text of zeros that would take seconds to build.
TEST_F(Ranks, ASignalEndsTheBuildOfADatasetAndNoRankIsSaidToHaveFailed) {
  write_file(project_ / "zeros/large.txt", "");
  fs::resize_file(project_ / "zeros/large.txt", std::uintmax_t{1} << 30);
  const std::string prefix = (project_ / "data/zeros").string();
  for (const int signal : {SIGINT, SIGTERM}) {
    std::vector<std::string> all{"train", "--ranks", "2"};
    for (const std::string& word : words("run", {"data.sets=[{path: " + prefix + ", text: [" + (project_ / "zeros").string() + "]}]"})) all.push_back(word);
    Child job(all);
    ASSERT_TRUE(wait_for([&] { return fs::exists(prefix + ".bin.partial"); })) << job.wait().err;
    job.signal(signal);
    const Exit stopped = job.wait();
    EXPECT_EQ(stopped.code, 1);
    EXPECT_EQ(stopped.err, "capstan: [" + prefix + "] stopped by " + (signal == SIGINT ? "SIGINT" : "SIGTERM") +
                               " while this dataset was built, of which nothing is left; the same command starts again\n");
    EXPECT_THAT(stopped.out, Not(HasSubstr("step 1/")));
    EXPECT_EQ(std::distance(fs::directory_iterator(project_ / "data"), {}), 0);
  }
}

TEST_F(Ranks, TorchrunsEnvironmentIsEnoughOnOneHost) {
  const Exit mpi = train_on(2, words("mpi"));
  ASSERT_EQ(mpi.code, 0) << mpi.err;
  std::vector<std::unique_ptr<Forked>> ranks;
  for (int r = 0; r < 2; ++r) {
    ranks.push_back(std::make_unique<Forked>([&, r] {
      setenv("RANK", std::to_string(r).c_str(), 1), setenv("LOCAL_RANK", std::to_string(r).c_str(), 1);
      setenv("WORLD_SIZE", "2", 1), setenv("LOCAL_WORLD_SIZE", "2", 1);
      setenv("MASTER_ADDR", "localhost", 1), setenv("MASTER_PORT", std::to_string(20000 + getppid() % 20000).c_str(), 1);
      std::vector<std::string> all{CAPSTAN_PROGRAM, "train"};
      for (const std::string& word : words("torch")) all.push_back(word);
      std::vector<char*> argv;
      for (std::string& word : all) argv.push_back(word.data());
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      return 98;
    }));
  }
  EXPECT_EQ(ranks[0]->wait(), 0) << ranks[0]->out();
  EXPECT_EQ(ranks[1]->wait(), 0) << ranks[1]->out();
  EXPECT_THAT(ranks[0]->out(), HasSubstr("2 ranks, started by torchrun"));
  EXPECT_EQ(ranks[1]->out(), "");
  EXPECT_EQ(steps_of(project_ / "torch"), steps_of(project_ / "mpi"));
}

TEST_F(Ranks, LaunchRefusesWhatItDoesNotUnderstand) {
  const auto said = [](std::vector<std::string> all) {
    all.insert(all.begin(), "launch");
    const Exit exit = Child(all).wait();
    EXPECT_EQ(exit.code, 2) << exit.err;
    return exit.err;
  };
  EXPECT_THAT(said({"--", "generate", "runs/x"}), HasSubstr("expected `train RECIPE ...` behind --, got 'generate'"));
  EXPECT_THAT(said({"--", "train"}), HasSubstr("train what?"));
  EXPECT_THAT(said({"--", "train", "r.yaml", "--ranks", "2"}), HasSubstr("--ranks belongs ahead of --"));
  EXPECT_THAT(said({"--", "train", "--fast", "r.yaml"}), HasSubstr("unknown option '--fast'"));
  EXPECT_THAT(said({"--ranks", "0", "--", "train", "r.yaml"}), HasSubstr("--ranks 0"));
  EXPECT_THAT(said({"--max-restarts", "-1", "--", "train", "r.yaml"}), HasSubstr("--max-restarts"));
}

TEST_F(Ranks, OneRankUnderALaunchNeedsNoMpi) {
  std::vector<std::string> all{"launch", "--max-restarts", "1", "--backoff", "0", "--", "train"};
  for (const std::string& word : words("run", accident("kill", 0, 5, "run"))) all.push_back(word);
  const Exit exit = Child(all, [] { setenv("PATH", "/nowhere", 1); }).wait();
  EXPECT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.err, AllOf(HasSubstr("signal 9"), HasSubstr("(restart 1 of 1)")));
  EXPECT_THAT(exit.out, HasSubstr("done: 10 steps"));
}

TEST_F(Ranks, WithoutMpirunItSaysWhatToInstall) {
  std::vector<std::string> all{"train", "--ranks", "2"};
  for (const std::string& word : words("run")) all.push_back(word);
  const Exit exit = Child(all, [] { setenv("PATH", "/nowhere", 1); }).wait();
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("there is no mpirun"), HasSubstr("openmpi-bin")));
}

}  // namespace
}  // namespace capstan::launch
