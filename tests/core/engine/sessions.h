// defines: Sessions: engines over the real plugins, in the test's own process, with batches of made-up tokens.
#pragma once
#include "train/session.h"

#include <capstan/optimizer.h>

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::engine_test {

using Parameters = std::map<std::string, std::vector<double>>;

inline std::vector<double> values(const Tensor& t) {
  const Tensor d = t.detach().to(DType::f64).contiguous();
  std::vector<double> all(static_cast<std::size_t>(d.numel()));
  d.copy_to_host(all.data(), d.bytes());
  return all;
}

inline Parameters parameters(const Engine& engine) {
  Parameters all;
  for (const NamedTensor& t : engine.tensors(false)) all[t.name] = values(t.value);
  return all;
}

class Sessions : public ::testing::Test {
 protected:
  static constexpr std::int64_t length = 24;

  Sessions() {
    std::string pattern = (std::filesystem::temp_directory_path() / "capstan_engine_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    folder_ = pattern;
    std::ofstream(folder_ / "recipe.yaml") << "model: {plugin: gpt, layers: 2, heads: 2, width: 32, context: 32}\n"
                                              "data: {sets: [{path: none}], sequence_length: 24, batch_size: 4}\n"
                                              "train: {steps: 3}\n"
                                              "run: {threads: 1}\n";
  }
  ~Sessions() override { std::filesystem::remove_all(folder_); }

  std::string recipe() const { return (folder_ / "recipe.yaml").string(); }

  /// An initialized engine with its optimizer.
  std::unique_ptr<train::Session> open(const std::vector<std::string>& overrides) const {
    auto s = train::open_session(recipe(), overrides, CAPSTAN_PROGRAM, train::Placement::gradients);
    s->engine->attach(s->host->make_as<Optimizer>(s->options().plugin("optimizer")));
    s->engine->initialize();
    return s;
  }

  /// Sequences [first, first + count) of a step that has `of`.
  static Batch batch_of(const train::Session& s, std::int64_t first, std::int64_t count, std::int64_t of) {
    const std::int64_t n = count * length;
    std::vector<std::int32_t> tokens, targets, lengths(static_cast<std::size_t>(count), static_cast<std::int32_t>(length));
    const Rng rng(11, "tokens");
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::uint64_t>(first * length + i);
      tokens.push_back(static_cast<std::int32_t>(rng.below(at, 256)));
      targets.push_back(static_cast<std::int32_t>(rng.below(at + 1, 256)));
    }
    Batch b = make_batch(*s.device, tokens, lengths, targets, {}, first * length);
    b.step_weight = static_cast<double>(of * length);
    return b;
  }
  static std::vector<Batch> step_batches(const train::Session& s, std::int64_t of, std::int64_t micro) {
    std::vector<Batch> all;
    for (std::int64_t i = 0; i < of; i += micro) all.push_back(batch_of(s, i, micro, of));
    return all;
  }

 private:
  std::filesystem::path folder_;
};

}  // namespace capstan::engine_test
