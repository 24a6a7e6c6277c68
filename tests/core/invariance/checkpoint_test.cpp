// Checkpoints on meshes: what one mesh saves, any other loads and goes on from, optimizer moments and data cursor included.
#include "core/invariance/support.h"

#include "checkpoint/manifest.h"
#include "train/trainer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace capstan::invariance {
namespace {

namespace fs = std::filesystem;

class Project {
 public:
  Project() {
    std::string pattern = (fs::temp_directory_path() / "capstan_mesh_save_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
    fs::create_directories(path_ / "text");
    for (int d = 0; d < 40; ++d) {
      std::string text;
      for (int i = 0; i < 11 + 17 * (d % 7); ++i) text += static_cast<char>('a' + (i * (d + 3) + i * i) % 26);
      std::ofstream(path_ / "text" / (std::to_string(100 + d) + ".txt")) << text;
    }
    std::ofstream(path_ / "recipe.yaml") << "model: {plugin: gpt, layers: 2, heads: 4, kv_heads: 2, width: 32, context: 32, dropout: 0.1, ffn: 48}\n"
                                            "data: {sets: [{path: set, text: [text]}], sequence_length: 24, batch_size: 5, micro_batch: 1, prefetch: 0}\n"
                                            "optimizer: {plugin: adamw, lr: 0.01}\n"
                                            "precision: {compute: f64}\n"
                                            "schedule: {decay: constant}\n"
                                            "train: {steps: 6, validate_every: 0, sample_every: 0}\n"
                                            "checkpoint: {every_steps: 3, keep: 0}\n"
                                            "run: {threads: 1}\n";
  }
  ~Project() { fs::remove_all(path_); }
  std::string recipe() const { return (path_ / "recipe.yaml").string(); }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

using Values = std::map<std::string, std::vector<double>>;

/// Trains to `steps` on a mesh, as the program does on each rank; the masters of the end.
Values run(const Project& project, const Layout& layout, const std::string& dir, int steps, const std::vector<std::string>& more) {
  std::vector<std::string> words = layout.overrides();
  words.push_back("run.dir=" + (project / dir).string());
  words.push_back("train.steps=" + std::to_string(steps));
  for (const std::string& w : more) words.push_back(w);
  Values last;
  std::mutex mutex;
  std::vector<std::string> errors;
  const auto rank = [&](const std::shared_ptr<World>& world) {
    try {
      auto session = train::open_session(project.recipe(), words, CAPSTAN_PROGRAM, train::Placement::gradients, world);
      Engine& engine = *session->engine;
      const std::shared_ptr<Model> model = session->model;
      train::Trainer trainer(std::move(session), [] { return 0; });
      trainer.run();
      for (const Parameter* p : model->parameters()) {
        const Tensor t = engine.whole_value(*p);
        if (!t.defined()) continue;
        std::vector<double> v(static_cast<std::size_t>(t.numel()));
        t.copy_to_host(v.data(), t.bytes());
        const std::lock_guard lock(mutex);
        last.emplace(p->name(), std::move(v));
      }
    } catch (const std::exception& e) {
      if (!world->fail_job(e.what())) return;
      const std::lock_guard lock(mutex);
      errors.push_back("rank " + std::to_string(world->rank()) + ": " + e.what());
    }
  };
  ::testing::internal::CaptureStdout();
  if (layout.world() == 1) {
    rank(make_single_world());
  } else {
    const auto worlds = make_thread_worlds(layout.world(), 20);
    std::vector<std::thread> threads;
    for (const auto& world : worlds) threads.emplace_back([&, world] { rank(world); });
    for (std::thread& t : threads) t.join();
  }
  const std::string out = ::testing::internal::GetCapturedStdout();
  for (const std::string& e : errors) ADD_FAILURE() << layout.name() << ": " << e << "\n" << out;
  return last;
}

double difference(const Values& a, const Values& b) {
  double worst = a.size() == b.size() ? 0 : 1e9;
  for (const auto& [name, v] : a)
    for (std::size_t i = 0; i < v.size(); ++i) worst = std::max(worst, std::abs(v[i] - b.at(name)[i]));
  return worst;
}

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
