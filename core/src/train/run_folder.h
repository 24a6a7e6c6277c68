// defines: LineFile; RunFolder: what a run leaves on the disk beside its checkpoints: recipe, log, metrics, samples.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace capstan::train {

/// A file that grows by whole lines: what a failed write left of one is cut off again ahead of the next.
class LineFile {
 public:
  explicit LineFile(std::string path) : path_(std::move(path)) {}
  ~LineFile() { close(); }
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;
  const std::string& path() const { return path_; }
  /// 0, or the errno of what failed; opens the file when it is not open.
  [[nodiscard]] int append(const std::string& line);
  void close();

 private:
  std::string path_;
  int file_ = -1;
  std::int64_t whole_ = -1;  // bytes of whole lines, where half a one may follow them
};

/// runs/<name>/: recipe.yaml (resolved), log.txt, metrics.jsonl, samples/, checkpoints/, ranks/rank_00003.log.
/// Rank 0 keeps it; what another rank logs goes to a file of its own, and the rest of what it says is dropped.
class CAPSTAN_API RunFolder {
 public:
  /// Makes the folder and, on rank 0, takes its lock; Error(input) when another process trains in it.
  explicit RunFolder(std::string path, int rank = 0);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string checkpoints() const { return path_ + "/checkpoints"; }
  bool has_checkpoints() const { return has_checkpoints(path_); }
  /// The same of a folder that need not be there, which nothing is done to. Error when it may not be looked into.
  static bool has_checkpoints(const std::string& path);
  void write_recipe(const std::string& yaml);
  /// Puts recipe.yaml aside as recipe.until_<step>.yaml; returns what there is to say of it. Error when there is one that
  /// cannot be kept.
  std::string keep_recipe(std::int64_t step);
  /// Drops metrics of steps after `step`: the run goes on from there and will write them again. Error, with the file as it
  /// was, when it cannot be read or changed.
  void rewind_metrics(std::int64_t step);
  /// One JSON object, one line, flushed. See docs/runs.md for the schema. One that cannot be written is left out; the first
  /// time that happens, returns what there is to say of it.
  [[nodiscard]] std::string metric(const std::string& json);
  void log(const std::string& line);
  void sample(std::int64_t step, const std::string& text);

 private:
  std::string path_;
  int rank_, lock_ = -1;
  LineFile metrics_, log_;
  bool told_ = false;  // that metrics are left out
};

}  // namespace capstan::train
