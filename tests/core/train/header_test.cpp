// What a run says and refuses before it takes memory: the header, the memory that it needs, sizes that fit nothing.
#include "support.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Exit run(const std::vector<std::string>& words) { return Child(words).wait(); }

void hold_address_space() {
  const rlimit limit{2u << 30, 2u << 30};
  ::setrlimit(RLIMIT_AS, &limit);
}

TEST(Header, ComesBeforeTheWeightsAndNamesAllMemory) {
  const Project project;
  // Weights of 3 GB in an address space of 2 GiB: the header stands above the error.
  const Exit big = Child({"train", project.recipe(), project.dir("big"), "model.width=4096", "model.layers=1", "checkpoint.at_end=true", "train.sample_every=5"}, hold_address_space).wait();
  EXPECT_EQ(big.code, 1) << big.out << big.err;
  EXPECT_THAT(big.out, AllOf(HasSubstr("capstan train "), HasSubstr("weights, gradients and optimizer"), HasSubstr(" activations"),
                             HasSubstr("to write checkpoints from"), HasSubstr("between steps for samples")));
}

TEST(Header, WhatIsMoreThanThisHostHasIsRefusedOrWarnedOf) {
  const Project project;
  const Exit weights = run({"train", project.recipe(), project.dir("a"), "model.width=65536", "model.layers=64"});
  EXPECT_EQ(weights.code, 2);
  EXPECT_THAT(weights.err, AllOf(HasSubstr("the weights, gradients and optimizer take "), HasSubstr("this host has "), HasSubstr("expected a smaller model")));
  // A batch whose activations fill petabytes: warned of, and then there is no memory for it.
  const Exit batch = Child({"train", project.recipe(), project.dir("b"), "data.batch_size=16000000", "data.micro_batch=16000000"}, hold_address_space).wait();
  EXPECT_NE(batch.code, 0);
  EXPECT_THAT(batch.err, AllOf(HasSubstr("warning: this run is estimated to take "), HasSubstr("data.micro_batch")));
}

TEST(Header, SizesThatFitNothingAreRefusedByTheirKey) {
  const Project project;
  for (const char* word : {"model.width=1000000000000000", "model.layers=1000000000", "model.context=9000000000000000000", "model.heads=1000000000"}) {
    const Exit e = run({"recipe", "check", project.recipe(), word});
    EXPECT_EQ(e.code, 2) << word;
    EXPECT_THAT(e.err, AllOf(HasSubstr(std::string(word).substr(0, std::string(word).find('='))), HasSubstr("expected"))) << word;
  }
  // Each size in its range, their product in none.
  const Exit e = run({"recipe", "check", project.recipe(), "model.width=1048576", "model.heads=65536", "model.head_size=65536", "model.context=16777216", "data.sequence_length=16777216", "data.batch_size=65536", "data.micro_batch=127"});
  EXPECT_EQ(e.code, 2);
  EXPECT_THAT(e.err, HasSubstr("a tensor of shape ["));
}

TEST(Header, CheckSaysWhatTrainRefuses) {
  const Project project;
  const Exit checked = run({"recipe", "check", project.recipe(), "data.sequence_length=4096"}),
             trained = run({"train", project.recipe(), project.dir("refused"), "data.sequence_length=4096"});
  EXPECT_EQ(checked.code, 2);
  EXPECT_EQ(trained.code, 2);
  EXPECT_EQ(checked.err, trained.err);
  // Data may come later, or lie on another machine: check goes on, and says it.
  const std::string sets = "data.sets=[{path: " + (project / "nowhere").string() + "}]";
  const Exit without = run({"recipe", "check", project.recipe(), sets}), stopped = run({"train", project.recipe(), project.dir("refused"), sets});
  EXPECT_EQ(without.code, 0) << without.err;
  EXPECT_THAT(without.out, AllOf(HasSubstr("; a run is refused here: there is no dataset "), HasSubstr("capstan data build --out ")));
  EXPECT_EQ(stopped.code, 2);
  EXPECT_FALSE(fs::exists(project / "refused"));
}

}  // namespace
}  // namespace capstan::train::testing
