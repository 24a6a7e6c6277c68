// defines: GemmChoices: which of cuBLASLt's algorithms a kind of product runs with, timed once and kept in a file. Another
// choice rounds differently: whoever reads the same file gets the same bits.
#pragma once
#include <cublasLt.h>

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>

namespace capstan::kernels::cuda {

/// The file: a line that says what it is, then a line for each choice, fields apart by tabs:
///   checksum, GPU, cuBLASLt's version, kind of product, workspace in bytes, the algorithm (8 hexadecimal words), microseconds
/// Lines of other GPUs and versions stay in it and are not used. Several processes may share it: the first to time a kind of
/// product decides for all.
class GemmChoices {
 public:
  struct Choice {
    cublasLtMatmulAlgo_t algorithm{};
    std::size_t workspace = 0;
    double seconds = 0;
  };

  /// Turns timing on; `file` "": choices live as long as this. Returns in words what the file holds. std::runtime_error with
  /// file, line and what to do when it is damaged or of another format.
  std::string open(const std::string& gpu, std::size_t version, const std::string& file);
  bool on() const { return on_; }
  const std::string& file() const { return file_; }

  /// The kept choice of a kind of product, else the one that `time` comes to, which is kept first. std::runtime_error when
  /// the file cannot be written.
  Choice choose(const std::string& kind, const std::function<Choice()>& time, bool& kept);

 private:
  void read();
  void write() const;
  std::string line_key(const std::string& kind) const { return gpu_ + '\t' + version_ + '\t' + kind; }
  bool on_ = false;
  std::string gpu_, version_, file_;
  std::map<std::string, Choice> choices_;  // by GPU, version and kind
};

/// The fastest of `seconds` (negative: it did not run), -1 when none ran. The library's first proposal is left only for one
/// that is faster by more than timing tells from noise.
int fastest(std::span<const double> seconds);

}  // namespace capstan::kernels::cuda
