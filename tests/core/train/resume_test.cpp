// A run that was killed or stopped goes on as if nothing had happened: the same metrics, the same weights and
// optimizer state, to the bit.
#include "support.h"

#include <gmock/gmock.h>

#include <csignal>
#include <fstream>
#include <sstream>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class Resume : public ::testing::TestWithParam<std::string> {};

TEST_P(Resume, AfterKillMinusNineGoesOnToTheBit) {
  Project project;
  const bool fp8 = GetParam().ends_with("fp8");
  const std::string compute = "precision.compute=" + (fp8 ? "bf16" : GetParam()), linear = "precision.linear=" + (fp8 ? GetParam() : "compute");
  const Exit straight = train(project.recipe(), {project.dir("straight"), compute, linear});
  ASSERT_EQ(straight.code, 0) << straight.out << straight.err;

  {
    Child child({"train", project.recipe(), project.dir("killed"), compute, linear});
    ASSERT_TRUE(child.read_until("step 11/20")) << child.wait().err;  // and no further: the program waits for its reader
    ASSERT_TRUE(wait_for([&] { return latest(project / "killed") == 10; }));
    child.signal(SIGKILL);
    EXPECT_EQ(child.wait().signal, SIGKILL) << "it had ended before the kill";
  }
  EXPECT_FALSE(has_checkpoint(project / "killed", 20));
  EXPECT_GT(metrics_with(project / "killed", "lr").size(), 10u) << "nothing was trained past the checkpoint";
  std::ofstream(project / "killed/metrics.jsonl", std::ios::app) << "{\"step\": 13, \"lo";  // a line that the kill cut

  const Exit resumed = train(project.recipe(), {project.dir("killed"), compute, linear});
  ASSERT_EQ(resumed.code, 0) << resumed.out << resumed.err;
  EXPECT_THAT(resumed.out, HasSubstr("at step 10 of 20"));
  EXPECT_EQ(resumed.err, "");
  EXPECT_EQ(metrics(project / "killed"), metrics(project / "straight"));
  EXPECT_EQ(metrics_with(project / "killed", "validation_loss").size(), 4u);
  EXPECT_EQ(weights(project / "killed", 20), weights(project / "straight", 20));
  EXPECT_EQ(weights(project / "killed", 10), weights(project / "straight", 10));
  EXPECT_NE(weights(project / "killed", 10), weights(project / "killed", 20));  // what is compared does change
}

INSTANTIATE_TEST_SUITE_P(Types, Resume, ::testing::Values("f32", "bf16", "fp8", "mxfp8"), [](const auto& info) { return info.param; });

class Signals : public ::testing::TestWithParam<int> {};

TEST_P(Signals, SaveAndStopAndTheSameCommandGoesOn) {
  Project project;
  const std::string name = GetParam() == SIGINT ? "SIGINT" : "SIGTERM";
  ASSERT_EQ(train(project.recipe(), {project.dir("straight")}).code, 0);

  Child child({"train", project.recipe(), project.dir("stopped")});
  ASSERT_TRUE(child.read_until("step 6/20")) << child.wait().err;
  child.signal(GetParam());
  const Exit stopped = child.wait();
  EXPECT_EQ(stopped.code, 1) << stopped.err;
  EXPECT_THAT(stopped.out, HasSubstr("stopped by " + name));
  const std::int64_t last = metrics_with(project / "stopped", "lr").back().at("step");
  EXPECT_GE(last, 6);
  EXPECT_LT(last, 20);
  EXPECT_THAT(stopped.out, HasSubstr("after step " + std::to_string(last)));
  EXPECT_EQ(latest(project / "stopped"), last);
  EXPECT_THAT(read_file(project / "stopped/log.txt"), HasSubstr("stopped by " + name));

  const Exit resumed = train(project.recipe(), {project.dir("stopped")});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_THAT(resumed.out, HasSubstr("at step " + std::to_string(last) + " of 20"));
  EXPECT_EQ(metrics(project / "stopped"), metrics(project / "straight"));
  EXPECT_EQ(weights(project / "stopped", 20), weights(project / "straight", 20));
}

// A text of zeros that would take seconds to build.
TEST_P(Signals, EndTheBuildOfADatasetAtOnce) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {project.dir("first"), "train.steps=1"}).code, 0);  // the set that is there before
  const std::string whole = read_file(project / "data/text.bin");
  write_file(project / "zeros/large.txt", "");
  fs::resize_file(project / "zeros/large.txt", std::uintmax_t{1} << 30);
  const std::string sets = "data.sets=[{path: " + (project / "data/text").string() + "}, {path: " + (project / "data/zeros").string() + ", text: [" + (project / "zeros").string() + "]}]";
  Child child({"train", project.recipe(), sets});
  ASSERT_TRUE(wait_for([&] { return fs::exists(project / "data/zeros.bin.partial"); })) << child.wait().err;
  child.signal(GetParam());
  const Exit exit = child.wait();
  EXPECT_EQ(exit.code, 1) << exit.err;
  EXPECT_THAT(exit.err, AllOf(HasSubstr("data/zeros"), HasSubstr(GetParam() == SIGINT ? "stopped by SIGINT" : "stopped by SIGTERM"), HasSubstr("the same command")));
  EXPECT_THAT(exit.out, Not(HasSubstr("step 1/")));
  EXPECT_EQ(latest(project / "run"), -1);
  for (const char* name : {"zeros.bin", "zeros.idx", "zeros.json", "zeros.bin.partial", "zeros.idx.partial"}) EXPECT_FALSE(fs::exists(project / "data" / name)) << name;
  EXPECT_EQ(read_file(project / "data/text.bin"), whole);
  fs::remove(project / "zeros/large.txt");
  fs::copy(project / "text", project / "zeros");
  const Exit again = train(project.recipe(), {sets, "train.steps=1"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_TRUE(fs::exists(project / "data/zeros.idx"));
}

INSTANTIATE_TEST_SUITE_P(Both, Signals, ::testing::Values(SIGTERM, SIGINT),
                         [](const auto& info) { return std::string(info.param == SIGINT ? "SIGINT" : "SIGTERM"); });

/// Whether the process still has a handler of its own for the signal.
bool catches(pid_t pid, int number) {
  std::istringstream status(read_file("/proc/" + std::to_string(pid) + "/status"));
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("SigCgt:")) return (std::stoull(line.substr(7), nullptr, 16) >> (number - 1) & 1) != 0;
  return false;
}

TEST(SecondSignal, EndsTheProgramAtOnce) {
  Project project;
  Child child({"train", project.recipe(), project.dir("run")});
  ASSERT_TRUE(child.read_until("step 3/20")) << child.wait().err;
  ASSERT_TRUE(catches(child.pid(), SIGTERM));
  child.signal(SIGTERM);
  ASSERT_TRUE(wait_for([&] { return !catches(child.pid(), SIGTERM); }));
  child.signal(SIGTERM);  // it is still in the step, for nobody reads its output
  const Exit exit = child.wait();
  EXPECT_EQ(exit.signal, SIGTERM);
  EXPECT_THAT(exit.out, Not(HasSubstr("stopped by")));
}

TEST(ResumeFinished, DoesNothingAndSaysSo) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const std::vector<std::string> before = metrics(project / "run");
  const Exit again = train(project.recipe(), {});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, AllOf(HasSubstr("at step 20 of 20"), HasSubstr("done: 20 steps")));
  EXPECT_EQ(metrics(project / "run"), before);
}

// Longer runs go on from the weights, though the schedule is another one: the person is told.
TEST(ResumeChanged, SaysThatTheRecipeIsAnother) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const Exit longer = train(project.recipe(), {"train.steps=24"});
  EXPECT_EQ(longer.code, 0) << longer.err;
  EXPECT_THAT(longer.err, HasSubstr("the recipe differs"));
  EXPECT_THAT(longer.out, HasSubstr("at step 20 of 24"));
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 24u);
  EXPECT_THAT(read_file(project / "run/recipe.yaml"), HasSubstr("steps: 24"));
}

TEST(Threads, DoNotChangeTheBits) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {project.dir("one"), "run.threads=1"}).code, 0);
  ASSERT_EQ(train(project.recipe(), {project.dir("two"), "run.threads=2"}).code, 0);
  EXPECT_EQ(metrics(project / "one"), metrics(project / "two"));
  EXPECT_EQ(weights(project / "one", 20), weights(project / "two", 20));
}

}  // namespace
}  // namespace capstan::train::testing
