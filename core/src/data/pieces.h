// defines: Piece, PieceSource: the work of a build cut into pieces of text, in the order of the output.
#pragma once
#include <cstdint>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/build.h"
#include "data/inputs.h"

namespace capstan::data {

/// Part of a file, a whole file, or whole lines of one.
struct Piece {
  std::size_t file = 0;
  std::int64_t begin = 0, bytes = 0;  ///< within the file
  bool starts_document = true, ends_document = true;
  std::int64_t first_line = 1;  ///< of `text`
  std::string text;             ///< lines; for whole files the worker reads it (read_text)
};

/// Not thread-safe: its callers take turns.
class PieceSource {
 public:
  explicit PieceSource(const BuildOptions& options);
  std::optional<Piece> next();
  void read_text(Piece& piece) const;  ///< thread-safe

  const InputFile& file(std::size_t index) const { return files_[index]; }
  std::size_t files() const { return files_.size(); }
  std::int64_t total_bytes() const { return total_bytes_; }
  /// The probability with which each line is kept (1 unless lines are sampled).
  double share() const { return share_; }

 private:
  void choose_files();
  std::optional<Piece> next_of_files();
  std::optional<Piece> next_of_lines();
  const BuildOptions& options_;
  std::vector<InputFile> files_;  // with the bytes to be taken of each
  std::int64_t total_bytes_ = 0;
  double share_ = 1;
  std::size_t file_ = 0;
  std::int64_t at_ = 0, line_ = 1;
  std::string carry_;
  std::ifstream stream_;
};

}  // namespace capstan::data
