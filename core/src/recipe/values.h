// defines: reading and writing single values as YAML text.
#pragma once
#include "recipe/yaml.h"

#include <capstan/options.h>

#include <cstdint>
#include <optional>
#include <string>

namespace capstan {

/// The shortest text that reads back as the same double.
std::string number_text(double value);

/// A text as one YAML scalar on one line: as it stands where that is plain, else in double quotes.
std::string yaml_text(const std::string& text);

/// A value, or why it is none: exactly one of the two is set.
template <class T>
struct Parsed {
  std::optional<T> value;
  std::string why;  ///< "expected an integer, got 'six'"
};

Parsed<bool> parse_flag(const YamlNode& node);
/// Decimal digits, or a floating form that is a whole number, such as 1e6.
Parsed<std::int64_t> parse_integer(const YamlNode& node);
/// A finite decimal number.
Parsed<double> parse_number(const YamlNode& node);
Parsed<std::string> parse_text(const YamlNode& node);
/// Absolute, relative to the folder of the file that says it; "" stays "".
Parsed<std::string> parse_path(const YamlNode& node);

/// `path` against `folder`, without "." and "..".
std::string absolute_path(const std::string& path, const std::string& folder);

/// Whether a plugin's name is the path of a library: it has a slash or ends in .so.
bool is_library_path(const std::string& name);

/// Why `value` is outside of what the spec allows, or "".
std::string range_fault(const OptionSpec& spec, double value);
std::string allowed_fault(const OptionSpec& spec, const std::string& value);

/// "0 to 0.5", "above 0", "one of a, b", or "".
std::string range_words(const OptionSpec& spec);

}  // namespace capstan
