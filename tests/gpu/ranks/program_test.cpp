// Real processes: `capstan train --ranks 2 run.device=cuda` trains as one rank does, and says how the GPUs reach each other.
#include "core/invariance/runs.h"

#include <capstan/device.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace capstan::invariance {
namespace {

using ::testing::HasSubstr;

struct Result {
  int code;
  std::string out;
};

Result train(const Project& project, const std::string& dir, const std::string& words) {
  const std::string command = std::string(CAPSTAN_PROGRAM) + " train " + project.recipe() +
                              " run.dir=" + (project / dir).string() + " " + words + " 2>&1";
  Result r{0, ""};
  FILE* pipe = popen(command.c_str(), "r");
  char part[4096];
  for (std::size_t n = 0; (n = fread(part, 1, sizeof part, pipe)) > 0;) r.out.append(part, n);
  r.code = pclose(pipe);
  return r;
}

std::vector<double> losses(const fs::path& run) {
  std::vector<double> all;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    const auto j = nlohmann::json::parse(line);
    if (j.contains("loss") && j.contains("step")) all.push_back(j["loss"].get<double>());
  }
  return all;
}

bool emulated() { return make_cuda_device()->describe().find("emulated") != std::string::npos; }

bool launches() { return std::system("command -v mpirun >/dev/null") == 0; }

TEST(Processes, TrainAsOneRankDoes) {
  if (!launches()) GTEST_SKIP() << "there is no mpirun: tests/gpu/run.sh starts ranks by hand";
  const Project project;
  const Result one = train(project, "one", "run.device=cuda train.steps=4");
  ASSERT_EQ(one.code, 0) << one.out;
  const Result two = train(project, "two", "--ranks 2 run.device=cuda mesh.gpu_communication=staged train.steps=4");
  ASSERT_EQ(two.code, 0) << two.out;
  EXPECT_THAT(two.out, HasSubstr("GPUs reach each other through host memory"));
  const std::vector<double> a = losses(project / "one"), b = losses(project / "two");
  ASSERT_EQ(a.size(), 4u);
  ASSERT_EQ(b.size(), 4u);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(a[i], b[i], 1e-9) << "step " << i + 1;
}

TEST(Processes, SayThatStepsOfStagedRanksAreNotRecorded) {
  if (!launches()) GTEST_SKIP() << "there is no mpirun";
  const Project project;
  const Result on = train(project, "on", "--ranks 2 run.device=cuda mesh.gpu_communication=staged run.cuda_graphs=on train.steps=1");
  EXPECT_NE(on.code, 0);
  EXPECT_THAT(on.out, ::testing::AllOf(HasSubstr("run.cuda_graphs"), HasSubstr("hosts wait in each collective"), HasSubstr("auto or off")));
  const Result automatic = train(project, "auto", "--ranks 2 run.device=cuda mesh.gpu_communication=staged train.steps=1");
  EXPECT_EQ(automatic.code, 0) << automatic.out;
  EXPECT_THAT(automatic.out, HasSubstr("off: hosts wait in each collective"));
}

// A kernel that is loaded at its first launch may wait for one of NCCL's that waits for another rank. A driver that reads another
// choice than expected has no GPU here.
TEST(Processes, LoadAllKernelsAtTheStartWhereNcclMayWait) {
  if (!launches()) GTEST_SKIP() << "there is no mpirun";
  if (!emulated()) GTEST_SKIP() << "only the emulated driver tells what it read";
  const Project project;
  const auto loaded = [&](const std::string& how, const std::string& words) {
    ::setenv("EMULATED_GPU_WANTS_LOADING", how.c_str(), 1);
    const Result r = train(project, how, words + " run.device=cuda train.steps=1");
    ::unsetenv("EMULATED_GPU_WANTS_LOADING");
    return r.code == 0 ? "" : r.out;
  };
  EXPECT_EQ(loaded("EAGER", "--ranks 2 mesh.gpu_communication=auto run.gpus='[0]'"), "");
  EXPECT_EQ(loaded("LAZY", "--ranks 2 mesh.gpu_communication=staged"), "");
  EXPECT_EQ(loaded("LAZY", ""), "");
}

TEST(Processes, SayWhichKeyAnImpossibleWishBelongsTo) {
  if (!launches()) GTEST_SKIP() << "there is no mpirun";
  const Project project;
  const Result r =
      train(project, "refused", "--ranks 2 run.device=cuda run.gpus='[0]' mesh.gpu_communication=nccl train.steps=1");
  EXPECT_NE(r.code, 0);
  EXPECT_THAT(r.out, HasSubstr("mesh.gpu_communication"));
  EXPECT_THAT(r.out, HasSubstr("ranks 0 and 1 share"));
}

}  // namespace
}  // namespace capstan::invariance
