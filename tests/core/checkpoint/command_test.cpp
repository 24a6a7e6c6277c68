// `capstan checkpoint info|verify` as a person runs them.
#include "support.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>

#include <array>
#include <cstdio>

namespace capstan::checkpoint::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int code = -1;
  std::string text;
};

Ran run(const std::string& words) {
  Ran ran;
  FILE* pipe = ::popen((std::string("'") + CAPSTAN_PROGRAM + "' checkpoint " + words + " 2>&1").c_str(), "r");
  std::array<char, 4096> block;
  while (const auto n = std::fread(block.data(), 1, block.size(), pipe)) ran.text.append(block.data(), n);
  const int status = ::pclose(pipe);
  if (WIFEXITED(status)) ran.code = WEXITSTATUS(status);
  return ran;
}

class Command : public ::testing::Test {
 protected:
  void SetUp() override {
    Saver saver(run_folder.path() / "checkpoints", hdf5(), options(false));
    save(saver, Model::mixed(1), 100);
    save(saver, Model::mixed(2), 200);
  }
  std::string quoted(const std::string& below = "") const { return "'" + (run_folder.path() / below).string() + "'"; }
  const Folder run_folder;
};

TEST_F(Command, InfoTellsStepsAndState) {
  const auto all = run("info " + quoted());
  EXPECT_EQ(all.code, 0) << all.text;
  EXPECT_THAT(all.text,
              AllOf(HasSubstr("step 200"), HasSubstr("step 100"), HasSubstr("hdf5"), HasSubstr("tensors:  13"),
                    HasSubstr("819200 tokens"), HasSubstr(R"({"sample":12})"), Not(HasSubstr("embedding.weight"))));
  const auto one = run("info --tensors " + quoted("checkpoints/step_000100"));
  EXPECT_EQ(one.code, 0) << one.text;
  EXPECT_THAT(one.text, AllOf(HasSubstr("step 100"), Not(HasSubstr("step 200")), HasSubstr("embedding.weight"),
                              HasSubstr("[33, 17]")));
}

TEST_F(Command, VerifyIsSilentlyGoodAndLoudlyNot) {
  const auto good = run("verify " + quoted());
  EXPECT_EQ(good.code, 0) << good.text;
  EXPECT_THAT(good.text, AllOf(HasSubstr("step 200: good"), HasSubstr("step 100: good")));
  const auto folder = run_folder.path() / "checkpoints/step_000200";
  flip_bit(folder / "shard_00000.h5", read_manifest(folder).tensors.at("counts").boxes.at(0).offset);
  const auto bad = run("verify " + quoted());
  EXPECT_EQ(bad.code, 2);
  EXPECT_THAT(bad.text, AllOf(HasSubstr("step 200: DAMAGED"), HasSubstr("tensor counts"), HasSubstr("step 100: good"),
                              HasSubstr("1 of 2 checkpoints damaged")));
  EXPECT_EQ(run("verify " + quoted("checkpoints/step_000100")).code, 0);
}

TEST_F(Command, VerifyTellsWhatCannotBeReadFromWhatIsDamaged) {
  const auto shard = run_folder.path() / "checkpoints/step_000200/shard_00000.h5";
  std::filesystem::remove(shard);
  std::filesystem::create_symlink(shard.filename(), shard);  // a link to itself, which nobody can open
  const auto bad = run("verify " + quoted());
  EXPECT_EQ(bad.code, 1);
  EXPECT_THAT(bad.text, AllOf(HasSubstr("step 200: CANNOT BE READ"), HasSubstr("shard_00000.h5"), HasSubstr("step 100: good"),
                              HasSubstr("1 of 2 checkpoints cannot be read"), Not(HasSubstr("amaged")), Not(HasSubstr("DAMAGED"))));
  const auto manifest = shard.parent_path() / "MANIFEST.json";
  std::filesystem::remove(manifest);
  std::filesystem::create_symlink(manifest.filename(), manifest);
  const auto all = run("info " + quoted());
  EXPECT_EQ(all.code, 0) << all.text;
  EXPECT_THAT(all.text, AllOf(HasSubstr("cannot be read:"), HasSubstr("step 100"), Not(HasSubstr("damaged"))));
}

TEST_F(Command, WhatIsNoCheckpointIsBadInput) {
  const auto absent = run("info " + quoted("absent"));
  EXPECT_EQ(absent.code, 2);
  EXPECT_THAT(absent.text, HasSubstr("no such run or checkpoint"));
  const Folder empty;
  const auto nothing = run("verify '" + empty.path().string() + "'");
  EXPECT_EQ(nothing.code, 2);
  EXPECT_THAT(nothing.text, HasSubstr("there are no checkpoints here"));
}

}  // namespace
}  // namespace capstan::checkpoint::testing
