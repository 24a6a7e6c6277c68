// defines: BuildOptions, build_dataset(): text files to a .bin/.idx dataset.
#pragma once
#include <capstan/export.h>
#include <capstan/tokenizer.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "data/indexed_dataset.h"

namespace capstan::data {

enum class Format : std::uint8_t {
  files,  ///< a file is a document
  lines,  ///< a line that is not blank is a document
  jsonl,  ///< a line is a JSON object whose "text" is a document
};

struct BuildProgress {
  std::int64_t bytes = 0, total_bytes = 0;  ///< of text
  std::int64_t documents = 0, tokens = 0;
};

struct BuildOptions {
  std::vector<std::string> inputs;  ///< files, folders, patterns: see find_inputs()
  std::string prefix;               ///< output: prefix.bin, prefix.idx, prefix.json; its folder is made
  std::shared_ptr<const Tokenizer> tokenizer;
  Format format = Format::files;
  std::int64_t max_bytes = 0;  ///< of text, chosen at random by `seed`; 0: everything
  std::uint64_t seed = 0;
  int threads = 0;                                          ///< 0: one for each core
  bool force = false;                                       ///< replace a dataset that is there
  std::int64_t longest_document = std::int64_t{256} << 20;  ///< bytes, unless the tokenizer splits anywhere
  std::int64_t window = std::int64_t{32} << 20;             ///< bytes of text in flight
  /// Called by the calling thread, several times a second; what it throws ends the build, and nothing is left of it.
  std::function<void(const BuildProgress&)> progress;
};

struct BuildResult {
  std::int64_t files = 0, documents = 0, tokens = 0, bytes = 0;
  std::int64_t empty = 0;  ///< documents without text, left out
  TokenType type = TokenType::u16;
};

/// Documents come in the order of their files' paths (and lines within a file), each followed by the tokenizer's
/// end-of-document token; the output does not depend on `threads`. With `max_bytes`, whole files are chosen at
/// random until the size is reached and the last one is cut to fit; of lines, each is kept with the probability
/// that gives about the size. On any error nothing is left behind.
CAPSTAN_API BuildResult build_dataset(const BuildOptions& options);

}  // namespace capstan::data
