// defines: Project, run(), difference(): whole runs of the trainer on a mesh, its ranks threads of this process.
#pragma once
#include "core/invariance/support.h"

#include "train/trainer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace capstan::invariance {

namespace fs = std::filesystem;

/// A folder with a recipe and the text that it trains on.
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
inline Values run(const Project& project, const Layout& layout, const std::string& dir, int steps, const std::vector<std::string>& more) {
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

inline double difference(const Values& a, const Values& b) {
  double worst = a.size() == b.size() ? 0 : 1e9;
  for (const auto& [name, v] : a)
    for (std::size_t i = 0; i < v.size(); ++i) worst = std::max(worst, std::abs(v[i] - b.at(name)[i]));
  return worst;
}

}  // namespace capstan::invariance
