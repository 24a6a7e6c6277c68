// defines: RunState, what a run needs beside its tensors to go on exactly where it was.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace capstan::checkpoint {

struct PluginBuild {
  std::string kind, name, version;
  bool operator==(const PluginBuild&) const = default;
};

/// Free of topology: nothing here depends on the number of ranks. Randomness needs only the seed and the
/// step, because every random number has an address.
struct CAPSTAN_API RunState {
  std::int64_t step = 0;    ///< finished optimizer steps
  std::int64_t tokens = 0;  ///< trained on so far
  std::uint64_t seed = 0;
  std::string data_cursor;  ///< JSON of the data's own, counted in global samples
  std::string recipe;       ///< resolved, as YAML
  std::string recipe_digest;
  std::vector<PluginBuild> plugins;
  std::map<std::string, std::string> more;  ///< other parts' state, by their name
  bool operator==(const RunState&) const = default;

  /// JSON text. Error(programming) when data_cursor is not JSON or a text is not UTF-8.
  std::string to_json() const;
  /// Strict inverse; Error(input) naming `where`.
  static RunState parse(const std::string& json, const std::string& where);
};

}  // namespace capstan::checkpoint
