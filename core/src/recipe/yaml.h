// defines: YamlNode, Origin, read_yaml(): a YAML file or a flow value as a small tree that knows where each part was
// written.
#pragma once
#include <capstan/export.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace capstan {

/// Where a value was said.
struct CAPSTAN_API Origin {
  enum class Kind : unsigned char { default_value, file, command_line };
  Kind kind = Kind::default_value;
  std::string file;  ///< as the user named it, or next to the file that extends it
  int line = 0;      ///< from 1

  /// "recipes/quickstart.yaml:12", "command line" or "default".
  std::string text() const;
  /// The folder that relative paths are relative to: the file's, else the working directory; absolute.
  std::string folder() const;
};

/// One value. Aliases are expanded, tags are refused, so there is nothing more to a recipe than this.
struct CAPSTAN_API YamlNode {
  enum class Kind : unsigned char { null, scalar, list, map };
  struct Entry;

  Kind kind = Kind::null;
  std::string text;             ///< of a scalar
  bool quoted = false;          ///< a scalar written in quotes or as a block: never a number or a flag
  std::vector<YamlNode> items;  ///< of a list
  std::vector<Entry> entries;   ///< of a map, in the order written, names unique
  Origin origin;

  const Entry* find(const std::string& name) const;
  Entry* find(const std::string& name);
  /// "a map", "a list", "nothing", "'abc'": for messages.
  std::string describe() const;
};

struct CAPSTAN_API YamlNode::Entry {
  std::string name;
  Origin origin;  ///< of the name
  YamlNode value;
};

/// What a recipe may cost to read. A real recipe is some kilobytes.
struct YamlLimits {
  std::size_t bytes = std::size_t{1} << 20;  ///< of one file
  std::size_t nodes = 100'000;               ///< after aliases are expanded
  std::size_t text = std::size_t{8} << 20;   ///< bytes of all scalars after aliases are expanded
  int depth = 64;
};

/// Reads a file that holds one map. Every defect of the file is Error(input) with file and line.
CAPSTAN_API YamlNode read_yaml_file(const std::string& path, const YamlLimits& limits = {});

/// Reads the text of a file; `origin.file` names it in messages.
CAPSTAN_API YamlNode parse_yaml(const std::string& text, const Origin& origin, const YamlLimits& limits = {});

/// One value as the command line or a default gives it: text that opens with [ or { or a quote is YAML, all
/// other text is taken as it stands.
CAPSTAN_API YamlNode parse_yaml_value(const std::string& text, const Origin& origin, const YamlLimits& limits = {});

/// `text` in single quotes, cut to a readable length, control characters as escapes: for messages.
CAPSTAN_API std::string shown(const std::string& text);

}  // namespace capstan
