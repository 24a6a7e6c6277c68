// A sample is a look at the model: whatever goes wrong in it costs the sample and not the run.
#include "in_process.h"

#include <gmock/gmock.h>

#include <memory>
#include <new>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// Has no memory for one text.
class Failing : public Tokenizer {
 public:
  explicit Failing(std::shared_ptr<Tokenizer> real) : real_(std::move(real)) {}
  std::string_view name() const override { return real_->name(); }
  std::int64_t vocabulary() const override { return real_->vocabulary(); }
  std::int32_t end_of_document() const override { return real_->end_of_document(); }
  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    if (text == "too much") throw std::bad_alloc();
    real_->encode(text, out);
  }
  std::string decode(std::span<const std::int32_t> tokens) const override { return real_->decode(tokens); }
  bool splits_anywhere() const override { return real_->splits_anywhere(); }

 private:
  std::shared_ptr<Tokenizer> real_;
};

TEST(Sample, ThatRunsOutOfMemoryDoesNotEndTheRun) {
  Project project;
  const Outcome run = run_trainer(project.recipe(), {project.dir("run"), "train.steps=4", "train.sample_every=2", "train.sample_prompt=too much"}, {},
                                  [](Session& session) { session.tokenizer = std::make_shared<Failing>(session.tokenizer); });
  ASSERT_FALSE(run.error) << run.error->what();
  EXPECT_EQ(run.steps.back(), 4);
  EXPECT_THAT(run.err, HasSubstr("no sample could be written, which does not end the run: std::bad_alloc"));
  EXPECT_THAT(read_file(project / "run/log.txt"), AllOf(HasSubstr("no sample could be written"), HasSubstr("done at step 4")));
}

}  // namespace
}  // namespace capstan::train::testing
