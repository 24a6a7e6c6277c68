// defines: Case, words_of(): a mesh, a model and a way of communication that tests of ranks on GPUs go through.
#pragma once
#include "core/invariance/support.h"

#include <ostream>
#include <string>
#include <vector>

namespace capstan::invariance {

/// Layout, form and type of a training run; `way`: mesh.gpu_communication; `more`: further key=value words.
struct Case {
  Layout layout;
  std::string form, type, way;
  std::vector<std::string> more{};
  std::string name{};
};

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.layout.name() << "/" << c.form << "/" << c.type << "/" << c.way; }

inline std::vector<std::string> words_of(const std::string& form, const std::string& type, const std::vector<std::string>& more) {
  std::vector<std::string> words = overrides_of(form);
  words.push_back("precision.compute=" + type);
  words.push_back("run.device=cuda");
  words.insert(words.end(), more.begin(), more.end());
  return words;
}
inline std::vector<std::string> words_of(const Case& c) {
  std::vector<std::string> more{"mesh.gpu_communication=" + c.way};
  more.insert(more.end(), c.more.begin(), c.more.end());
  return words_of(c.form, c.type, more);
}

}  // namespace capstan::invariance
