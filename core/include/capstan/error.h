// defines: Error, the one exception type of Capstan, and fail(): how it is thrown.
#pragma once
#include <capstan/export.h>

#include <stdexcept>
#include <string>

namespace capstan {

/// Who can mend a fault; the program's exit code follows from it (input: 2, all others: 1).
enum class Fault : unsigned char {
  input,        ///< what the user gave: a recipe, data, a plugin, a checkpoint, a request
  runtime,      ///< the machine or a library: disk full, out of memory, a failed primitive
  programming,  ///< a caller broke an interface's contract: a shape, a freed graph, an unknown option
};

/// Text of every Error: `[where] what is wrong: expected ..., got ...; what to do`.
class CAPSTAN_API Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
  ~Error() override;
  Fault fault() const noexcept { return fault_; }

 private:
  Fault fault_;
};

/// Throws Error. `where` is the op, file:line, key, tensor or rank; it is printed in brackets.
[[noreturn]] CAPSTAN_API void fail(Fault fault, const std::string& where, const std::string& message);

/// The closest of `known` to `word` by edit distance, or "" when nothing is near (for "did you mean").
template <class Range>
std::string nearest(const std::string& word, const Range& known);

CAPSTAN_API int edit_distance(const std::string& a, const std::string& b);

template <class Range>
std::string nearest(const std::string& word, const Range& known) {
  std::string best;
  int best_distance = static_cast<int>(word.size()) / 2 + 2;
  for (const auto& candidate : known) {
    const int d = edit_distance(word, std::string(candidate));
    if (d < best_distance) best_distance = d, best = std::string(candidate);
  }
  return best;
}

}  // namespace capstan
