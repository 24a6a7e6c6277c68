// defines: Plans: predictions over the real plugins, for recipes that are never run.
#pragma once
#include "plan/paper_world.h"
#include "plan/predict.h"
#include "plan/setting.h"
#include "train/session.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::plan::testing {

class Folder {
 public:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "capstan_plan_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
    std::ofstream(recipe()) << "model: {plugin: gpt, layers: 4, heads: 4, width: 64, context: 64, vocabulary: 300}\n"
                               "data: {sets: [{path: none}], sequence_length: 64, batch_size: 16}\n"
                               "checkpoint: {at_end: false}\n"
                               "train: {steps: 3}\n"
                               "run: {threads: 1}\n";
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string recipe() const { return (path_ / "recipe.yaml").string(); }

 private:
  std::filesystem::path path_;
};

struct Planned { Setting setting; Prediction prediction; };

/// What a recipe with these overrides comes to over `ranks` ranks.
inline Planned plan_of(const std::vector<std::string>& overrides, int ranks, const DeviceModel* device = nullptr, const Assumptions& assumptions = {}) {
  const Folder folder;
  const auto session = train::open_session(folder.recipe(), overrides, CAPSTAN_PROGRAM, train::Placement::none, make_paper_world(0, ranks));
  Planned p;
  p.setting = setting_from(*session, ranks);
  p.prediction = predict(sources_from(*session), p.setting, device, assumptions);
  return p;
}

inline DeviceModel device(const std::string& name) { return load_device(std::string(CAPSTAN_SOURCE_DIR) + "/core/data/devices.yaml", name); }

}  // namespace capstan::plan::testing
