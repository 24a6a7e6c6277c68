// precision.linear in whole runs: the loss beside that of bf16, what the header says, what is refused.
#include "support.h"

#include <gmock/gmock.h>

#include <cmath>

namespace capstan::train::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::vector<double> losses(const Project& project, const std::string& name, std::vector<std::string> words) {
  words.insert(words.end(), {project.dir(name), "train.steps=50", "train.validate_every=0", "checkpoint.every_steps=0",
                             "checkpoint.at_end=false"});
  const Exit run = train(project.recipe(), words);
  EXPECT_EQ(run.code, 0) << run.err;
  std::vector<double> all;
  for (const nlohmann::json& line : metrics_with(project / name, "loss")) all.push_back(line.at("loss"));
  return all;
}

/// Largest relative difference of a step's loss, and that of the mean of the last ten.
std::pair<double, double> apart(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0, mean_a = 0, mean_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]) / b[i]);
  for (std::size_t i = a.size() - 10; i < a.size(); ++i) mean_a += a[i], mean_b += b[i];
  return {worst, std::abs(mean_a - mean_b) / mean_b};
}

TEST(Fp8Training, FollowsTheLossOfBf16) {
  Project project;
  const std::vector<double> plain = losses(project, "bf16", {"precision.compute=bf16"});
  ASSERT_EQ(plain.size(), 50u);
  EXPECT_LT(plain.back(), plain.front() - 1.5);  // it does learn
  // Ten times what was seen: each rounding to 4 bits is off by up to 6 %, but their errors are as often up as down.
  for (const std::vector<std::string>& words : {std::vector<std::string>{"precision.linear=fp8"},
                                                {"precision.linear=mxfp8"},
                                                {"precision.linear=mxfp8", "precision.linear_gradient=e4m3"}}) {
    std::vector<std::string> all{"precision.compute=bf16"};
    all.insert(all.end(), words.begin(), words.end());
    const std::vector<double> narrow = losses(project, words.back(), all);
    ASSERT_EQ(narrow.size(), 50u);
    const auto [worst, last] = apart(narrow, plain);
    std::printf("%s: at most %.4f apart, last ten %.4f\n", words.back().c_str(), worst, last);
    EXPECT_NE(narrow, plain);
    EXPECT_LT(worst, 0.003);  // seen: 0.0003
    EXPECT_LT(last, 0.002);   // 0.0002
  }
}

TEST(Fp8Training, SaysWhatRunsInFp8AndWhatDoesNot) {
  Project project;
  const std::vector<std::string> short_run{"train.steps=1", "checkpoint.every_steps=0", "checkpoint.at_end=false",
                                           "precision.compute=bf16"};
  const auto header = [&](const std::string& name, std::vector<std::string> words) {
    words.insert(words.end(), short_run.begin(), short_run.end());
    words.push_back(project.dir(name));
    const Exit run = train(project.recipe(), words);
    EXPECT_EQ(run.code, 0) << run.err;
    return run.out;
  };
  EXPECT_THAT(header("a", {}), Not(HasSubstr("fp8")));
  const std::string all = header("b", {"precision.linear=fp8", "model.ffn=64"});
  EXPECT_THAT(all, HasSubstr("bf16, linear layers in fp8 (e4m3, gradients e5m2)\n"));
  EXPECT_THAT(all, HasSubstr("weights in fp8"));
  EXPECT_THAT(header("c", {"precision.linear=mxfp8", "precision.linear_gradient=e4m3", "model.ffn=40"}),
              HasSubstr("bf16, linear layers in mxfp8 (e4m3, gradients e4m3), but for 4 of 8 whose dimensions are not "
                        "multiples of 32: layers.0."));
}

TEST(Fp8Training, RefusesWhatCannotBe) {
  Project project;
  const Exit f64 = train(project.recipe(), {"precision.compute=f64", "precision.linear=fp8"});
  EXPECT_EQ(f64.code, 2);
  EXPECT_THAT(f64.err,
              HasSubstr("precision.linear] fp8 rounds to 8 bits what precision.compute=f64 is for; expected compute"));
  const Exit widths = train(project.recipe(), {"precision.linear=mxfp8", "model.width=24", "model.heads=2", "model.ffn=40"});
  EXPECT_EQ(widths.code, 2);
  EXPECT_THAT(
      widths.err,
      HasSubstr("precision.linear] mxfp8: none of the model's 8 linear layers has dimensions that are multiples of 32"));
  const Exit word = train(project.recipe(), {"precision.linear=fp4"});
  EXPECT_EQ(word.code, 2);
  EXPECT_THAT(word.err, HasSubstr("compute, fp8"));
  EXPECT_FALSE(fs::exists(project / "run"));
}

}  // namespace
}  // namespace capstan::train::testing
