// Checkpoints on meshes: what one mesh saves, any other loads and goes on from, optimizer moments and data cursor included.
#include "core/invariance/runs.h"

#include "checkpoint/manifest.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

namespace capstan::invariance {
namespace {

std::vector<Layout> meshes() {
  return {{1, 1, 1, 1, 1}, {1, 1, 2, 1, 1}, {1, 2, 2, 1, 1}, {1, 1, 4, 1, 1, "zero1"}, {1, 2, 1, 1, 1, "ddp"}, {1, 1, 3, 1, 1},
          {1, 1, 1, 1, 2}, {1, 1, 2, 1, 2}, {1, 1, 1, 2, 1}, {2, 1, 1, 1, 1}, {2, 1, 2, 1, 2}};
}

class SaveAndLoad : public ::testing::TestWithParam<std::tuple<Layout, std::string>> {};

TEST_P(SaveAndLoad, AnyOtherMeshGoesOn) {
  const auto& [from, optimizer] = GetParam();
  const std::vector<std::string> more{"optimizer={plugin: " + optimizer + ", lr: 0.01}"};
  const Project project;
  const Values whole = run(project, {}, "whole", 6, more);
  run(project, from, "saved", 3, more);
  ASSERT_TRUE(fs::exists(project / "saved/checkpoints/step_000003/MANIFEST.json"));
  EXPECT_TRUE(checkpoint::verify(project / "saved/checkpoints/step_000003").empty());
  for (const Layout& to : meshes()) {
    fs::remove_all(project / "loaded");
    fs::copy(project / "saved", project / "loaded", fs::copy_options::recursive);
    EXPECT_LT(difference(run(project, to, "loaded", 6, more), whole), 1e-9) << from.name() << " to " << to.name();
  }
  // The same mesh goes on bit by bit.
  const Values straight = run(project, from, "straight", 6, more);
  fs::remove_all(project / "loaded");
  fs::copy(project / "saved", project / "loaded", fs::copy_options::recursive);
  EXPECT_EQ(run(project, from, "loaded", 6, more), straight) << from.name();
}

std::string text_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class Sample : public ::testing::TestWithParam<Layout> {};

TEST_P(Sample, IsThatOfOneRank) {
  const std::vector<std::string> more{"train.sample_every=2", "train.sample_tokens=12", "train.sample_prompt=ab", "checkpoint.at_end=false", "checkpoint.every_steps=0"};
  const Project project;
  const Values one = run(project, {}, "one", 4, more), mesh = run(project, GetParam(), "mesh", 4, more);
  for (const char* file : {"samples/step_000002.txt", "samples/step_000004.txt"}) {
    EXPECT_GT(text_of(project / "one" / file).size(), 2u);
    EXPECT_EQ(text_of(project / "mesh" / file), text_of(project / "one" / file)) << file;
  }
  EXPECT_LT(difference(mesh, one), 1e-9) << "training goes on as if nobody had looked";
}

INSTANTIATE_TEST_SUITE_P(Meshes, Sample, ::testing::ValuesIn(meshes()), [](const auto& info) { return info.param.name(); });

std::string name_of(const ::testing::TestParamInfo<std::tuple<Layout, std::string>>& info) {
  return std::get<0>(info.param).name() + "_" + std::get<1>(info.param);
}

INSTANTIATE_TEST_SUITE_P(Meshes, SaveAndLoad, ::testing::Combine(::testing::ValuesIn(meshes()), ::testing::Values("adamw", "muon")), name_of);

}  // namespace
}  // namespace capstan::invariance
