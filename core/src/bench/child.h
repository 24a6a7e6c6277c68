// defines: run_child(): a program's output, for measurements that want a process of their own.
#pragma once
#include <capstan/export.h>

#include <string>
#include <vector>

namespace capstan::bench {

struct CAPSTAN_API ChildResult {
  int status = -1;          ///< exit code; 128 + the signal that ended it; 127: it could not be started
  std::string out, errors;  ///< what it wrote
  /// The last line of `errors` (or of `out`) that is not empty: what a person would want to know of a failure.
  std::string last_words() const;
};

/// Runs words[0] (searched in PATH) with the other words and waits. After `seconds` it and its children are killed.
CAPSTAN_API ChildResult run_child(const std::vector<std::string>& words, double seconds);

}  // namespace capstan::bench
