// defines: what the training tests share: a folder with text and a tiny recipe, the program as a child process whose
// speed the test controls, metrics and checkpoints as values to compare.
#pragma once
#include "checkpoint/manifest.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <sys/resource.h>
#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace capstan::train::testing {

namespace fs = std::filesystem;

/// A folder that goes with the test, with `text/` to train on and `recipe.yaml`: a GPT of two layers, 32 wide,
/// 20 steps of 4 x 32 bytes in two microbatches, dropout, clipping, a cosine schedule, validation every 5 steps
/// and a checkpoint every 10.
class Project {
 public:
  Project();
  ~Project();
  Project(const Project&) = delete;
  Project& operator=(const Project&) = delete;
  fs::path operator/(const std::string& name) const { return path_ / name; }
  std::string recipe() const { return (path_ / "recipe.yaml").string(); }
  /// "run.dir=<this folder>/<name>"
  std::string dir(const std::string& name) const { return "run.dir=" + (path_ / name).string(); }

 private:
  fs::path path_;
};

void write_file(const fs::path& file, const std::string& text);
std::string read_file(const fs::path& file);
/// A thousand bytes or so of words, the same for the same number.
std::string some_text(std::uint64_t number);

struct Exit {
  int code = -1;    ///< exit code, or -1 when a signal ended it
  int signal = 0;   ///< that ended it
  std::string out, err;
};

/// Whether the data set of the project is there.
bool built_data(const Project& project);

/// `capstan WORDS...` whose standard output holds only about six unread lines: a test that stops reading stops the
/// program soon after.
class Child {
 public:
  /// `before` runs in the child ahead of the program.
  explicit Child(const std::vector<std::string>& words, const std::function<void()>& before = {});
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  pid_t pid() const { return pid_; }
  /// Reads until the output holds `text`; false when the output ends first.
  bool read_until(const std::string& text);
  /// What it has written to standard error so far.
  std::string err() const;
  const std::string& out() const { return out_; }
  void signal(int number);
  /// Reads the rest and waits.
  Exit wait();

 private:
  bool read_some();
  pid_t pid_ = -1;
  int output_ = -1;
  fs::path errors_;
  std::string out_;
};

/// Runs `capstan train RECIPE WORDS...` to its end.
Exit train(const std::string& recipe, std::vector<std::string> words);

/// Lines of metrics.jsonl without what depends on the clock.
std::vector<std::string> metrics(const fs::path& run);
/// Lines of metrics.jsonl that have `field`.
std::vector<nlohmann::json> metrics_with(const fs::path& run, const std::string& field);
/// Every key and the name of every event in metrics.jsonl stands in docs/runs.md.
void expect_documented_metrics(const fs::path& run);

/// Tensor name -> xxh3 of its bytes, of a run's checkpoint; empty with a failure when there is none.
std::map<std::string, std::vector<std::uint64_t>> weights(const fs::path& run, std::int64_t step);
bool has_checkpoint(const fs::path& run, std::int64_t step);
/// The step that LATEST names; -1 when there is none.
std::int64_t latest(const fs::path& run);

/// The largest file that the process may write from now on.
void limit_files(pid_t pid, rlim_t bytes);

/// Asks `done` until it is true or ten seconds are over.
bool wait_for(const std::function<bool()>& done);

}  // namespace capstan::train::testing
