// Ranks with GPUs: on any mesh the loss and every gradient of one rank, whatever carries them; checkpoints and samples
// across; ranks that disagree are named.
#include "base/cuda_device.h"
#include "core/invariance/runs.h"
#include "gpu/ranks/case.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <support/tolerance.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <tuple>

namespace capstan::invariance {
namespace {

using ::testing::HasSubstr;

/// The run on one rank, made once in a process.
const Trained& reference(const std::string& form, const std::string& type) {
  static std::map<std::pair<std::string, std::string>, Trained> runs;
  auto [it, fresh] = runs.try_emplace({form, type});
  if (fresh) it->second = train_on({}, words_of(form, type, {}), 2);
  return it->second;
}

double norm(const std::vector<double>& v) {
  double s = 0;
  for (const double x : v) s += x * x;
  return std::sqrt(s);
}

bool can(const Layout& layout, const std::string& way) { return way != "nccl" || layout.world() <= cuda_device_count(); }

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto staged = [&](Layout layout, const char* form, const char* type, std::vector<std::string> more = {},
                          std::string name = "") {
    all.push_back({layout, form, type, "staged", std::move(more), std::move(name)});
  };
  const auto both = [&](Layout layout, const char* form, const char* type, std::vector<std::string> more = {},
                        std::string name = "") {
    staged(layout, form, type, more, name);
    all.push_back({layout, form, type, "nccl", std::move(more), std::move(name)});
  };
  staged({1, 1, 2, 1, 1}, "gpt2", "f64");
  both({1, 2, 2, 1, 1}, "llama", "f64");
  staged({1, 1, 2, 1, 1, "zero1"}, "odd", "f64");
  both({1, 1, 1, 1, 2}, "odd", "f64");
  both({1, 1, 1, 2, 1}, "llama", "f64");
  both({2, 1, 1, 1, 1}, "gpt2", "f64");
  both({2, 1, 2, 1, 1}, "odd", "f32", {"mesh.pipeline.schedule=zero_bubble"}, "zero_bubble");
  staged({1, 1, 1, 2, 2}, "odd", "f32");
  staged({1, 1, 2, 1, 2}, "llama", "f64", {"optimizer={plugin: muon, lr: 0.01}"}, "muon");
  return all;
}

class OnGpus : public ::testing::TestWithParam<Case> {};

TEST_P(OnGpus, LossAndEveryGradientAreThoseOfOneRank) {
  const Case& c = GetParam();
  if (!can(c.layout, c.way)) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  const Trained& one = reference(c.form, c.type);
  std::vector<std::string> words = words_of(c.form, c.type, c.more);
  words.push_back("mesh.gpu_communication=" + c.way);
  const Trained run = train_on(c.layout, words, 2);
  ASSERT_EQ(run.losses.size(), 2u);
  const DType dtype = dtype_from(c.type);
  const double tolerance = bounds::mesh(dtype);
  ASSERT_EQ(run.initial.size(), one.initial.size());
  for (const auto& [name, values] : one.initial)
    EXPECT_TRUE(run.initial.at(name) == values) << name << ": initial bits differ";
  EXPECT_NEAR(run.losses[0], one.losses[0], bounds::curve(dtype));
  if (c.more.empty()) {
    EXPECT_NEAR(run.losses[1], one.losses[1], bounds::curve(dtype));
  }
  EXPECT_NEAR(run.norms[0] / one.norms[0], 1, tolerance);
  double whole = 0;
  for (const auto& [name, g] : one.gradients) whole += norm(g) * norm(g);
  whole = std::sqrt(whole);
  ASSERT_EQ(run.gradients.size(), one.gradients.size());
  for (const auto& [name, g0] : one.gradients) {
    std::vector<double> difference = run.gradients.at(name);
    ASSERT_EQ(difference.size(), g0.size()) << name;
    for (std::size_t i = 0; i < g0.size(); ++i) difference[i] -= g0[i];
    EXPECT_LE(norm(difference), tolerance * std::max(norm(g0), 1e-3 * whole)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, OnGpus, ::testing::ValuesIn(cases()), [](const auto& info) {
  const Case& c = info.param;
  return c.layout.name() + "_" + c.form + "_" + c.type + (c.name.empty() ? "" : "_" + c.name) + "_" + c.way;
});

/// Gradients sent as bf16 are summed in f32: as far from one rank's as bf16 rounds, over either way.
TEST(OnGpusToo, NarrowGradientsAreSummedWide) {
  for (const char* strategy : {"fsdp", "zero1", "ddp"})
    for (const char* way : {"staged", "nccl"}) {
      const Layout layout{1, 1, 2, 1, 1, strategy};
      if (!can(layout, way)) continue;
      const Trained& one = reference("llama", "f32");
      const Trained run =
          train_on(layout, words_of("llama", "f32", {"mesh.reduce=bf16", std::string("mesh.gpu_communication=") + way}), 1);
      for (const auto& [name, g0] : one.gradients) {
        std::vector<double> difference = run.gradients.at(name);
        for (std::size_t i = 0; i < g0.size(); ++i) difference[i] -= g0[i];
        EXPECT_LE(norm(difference), 0x1p-7 * norm(g0)) << strategy << " " << way << " " << name;
        EXPECT_GT(norm(difference), 0) << name << ": nothing was rounded";
      }
    }
}

/// What is sent as it lies is in memory that NCCL has registered: whole gradients, not when narrow copies are sent; whole weights that are
/// gathered; pieces that replicas sum. `held`: what NCCL holds then, against a run where the same communicators send something else.
TEST(OnGpusToo, WhatIsSentAsItLiesIsRegistered) {
  const auto held = [](const Layout& layout, const char* reduce) {
    std::pair<std::int64_t, EngineMemory> found;
    on_ranks(layout, {"model={plugin: gpt, layers: 4, heads: 4, width: 256, context: 64, vocabulary: 512}", "run.device=cuda", "mesh.gpu_communication=nccl", std::string("mesh.reduce=") + reduce},
             [&](train::Session& session) {
               if (session.rank() == 0) found = {communication_bytes(*session.device), session.engine->memory()};
             });
    return found;
  };
  constexpr double buffers = 1 << 20;  // may differ by as much
  if (cuda_device_count() < 2) GTEST_SKIP() << "NCCL wants a GPU for each rank";
  for (const char* strategy : {"ddp", "zero1"}) {
    const auto [wide, memory] = held({1, 1, 2, 1, 1, strategy}, "f32");
    EXPECT_NEAR(static_cast<double>(wide - held({1, 1, 2, 1, 1, strategy}, "bf16").first), static_cast<double>(memory.gradients), buffers) << strategy;
  }
  const auto [ddp, whole] = held({1, 1, 2, 1, 1, "ddp"}, "f32");
  EXPECT_NEAR(static_cast<double>(held({1, 1, 2, 1, 1, "zero1"}, "f32").first - ddp), static_cast<double>(whole.masters), buffers) << "weights";
  if (cuda_device_count() < 4) return;
  const auto [hsdp, pieces] = held({1, 2, 2, 1, 1, "fsdp"}, "f32");
  EXPECT_NEAR(static_cast<double>(hsdp - held({1, 1, 4, 1, 1, "fsdp"}, "f32").first), static_cast<double>(pieces.gradients), 2 * buffers) << "replicas";
}

TEST(OnGpusToo, ACheckpointOfGpusGoesOnOnACpuAndBack) {
  const Project project;
  const Values whole = run(project, {}, "whole", 6, {});
  const std::vector<std::string> gpu{"run.device=cuda", "mesh.gpu_communication=staged"};
  const Layout pieces{1, 1, 2, 1, 1}, stages{2, 1, 1, 1, 1};
  run(project, pieces, "forth", 3, gpu);
  EXPECT_LT(difference(run(project, {}, "forth", 6, {}), whole), 1e-9);
  run(project, {}, "back", 3, {});
  EXPECT_LT(difference(run(project, stages, "back", 6, gpu), whole), 1e-9);
}

TEST(OnGpusToo, ASampleIsThatOfOneRank) {
  const std::vector<std::string> more{"run.device=cuda",         "mesh.gpu_communication=staged", "train.sample_every=2",
                                      "train.sample_tokens=8",   "train.sample_prompt=ab",        "checkpoint.at_end=false",
                                      "checkpoint.every_steps=0"};
  const auto text_of = [](const fs::path& file) {
    std::ifstream in(file, std::ios::binary);
    return std::string{std::istreambuf_iterator<char>(in), {}};
  };
  const Project project;
  const Values one = run(project, {}, "one", 2, more), mesh = run(project, {2, 1, 1, 1, 2}, "mesh", 2, more);
  EXPECT_GT(text_of(project / "one/samples/step_000002.txt").size(), 2u);
  EXPECT_EQ(text_of(project / "mesh/samples/step_000002.txt"), text_of(project / "one/samples/step_000002.txt"));
  EXPECT_LT(difference(mesh, one), 1e-9);
}

TEST(OnGpusToo, ABitThatDiffersIsFoundAndNamed) {
  for (const Layout& layout : {Layout{1, 2, 1, 1, 1}, Layout{1, 1, 1, 1, 2}}) {
    const std::string parameter = "layers.1.mlp.norm.weight";
    on_ranks(layout, {overrides_of("llama")[0], "run.device=cuda", "mesh.gpu_communication=staged"},
             [&](train::Session& session) {
               Engine& engine = *session.engine;
               engine.initialize();
               EXPECT_EQ(engine.disagreement(), "");
               if (session.rank() == 1)
                 for (const NamedTensor& t : engine.tensors(false))
                   if (t.name == "model/" + parameter) {
                     std::vector<unsigned char> bytes(static_cast<std::size_t>(t.value.bytes()));
                     t.value.copy_to_host(bytes.data(), t.value.bytes());
                     bytes[5] ^= 4;
                     t.value.copy_from_host(bytes.data(), t.value.bytes());
                   }
               EXPECT_THAT(engine.disagreement(), HasSubstr(parameter));
             });
  }
}

}  // namespace
}  // namespace capstan::invariance
