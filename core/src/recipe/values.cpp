// Single values: numbers, flags, texts and paths from YAML scalars and back.
#include "recipe/values.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>

namespace capstan {
namespace {

template <class T>
Parsed<T> wrong(const std::string& expected, const YamlNode& node) {
  return {std::nullopt, "expected " + expected + ", got " + node.describe()};
}

/// from_chars takes no leading plus.
std::string_view without_plus(const std::string& text) {
  std::string_view view = text;
  if (view.size() > 1 && view[0] == '+' && view[1] != '-') view.remove_prefix(1);
  return view;
}

template <class T>
std::optional<T> whole(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::string number_text(double value) {
  // fmt's shortest form reads back exactly.
  return fmt::format("{}", value);
}

std::string yaml_text(const std::string& text) {
  const auto word = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '/' ||
           c == '-';
  };
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '/'; };
  // Words that other YAML readers take for something else stay in quotes.
  static constexpr std::string_view special[] = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan"};
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? char(c + 32) : c; });
  if (!text.empty() && letter(text[0]) && std::all_of(text.begin(), text.end(), word) &&
      std::find(std::begin(special), std::end(special), lower) == std::end(special)) {
    return text;
  }
  std::string out = "\"";
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += '\\', out += c;
    else if (c == '\n')
      out += "\\n";
    else if (c == '\t')
      out += "\\t";
    else if (c == '\r')
      out += "\\r";
    else if (u < 0x20 || u == 0x7F)
      out += fmt::format("\\x{:02x}", u);
    else
      out += c;
  }
  return out + '"';
}

Parsed<bool> parse_flag(const YamlNode& node) {
  if (node.kind == YamlNode::Kind::scalar && !node.quoted) {
    if (node.text == "true") return {true, ""};
    if (node.text == "false") return {false, ""};
  }
  return wrong<bool>("true or false", node);
}

Parsed<std::int64_t> parse_integer(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::scalar || node.quoted) return wrong<std::int64_t>("an integer", node);
  const std::string_view text = without_plus(node.text);
  if (const auto value = whole<std::int64_t>(text)) return {*value, ""};
  const auto real = whole<double>(text);
  if (!real || !std::isfinite(*real)) {
    if (node.text.find('_') != std::string::npos)
      return wrong<std::int64_t>("an integer without _ between its digits", node);
    const bool digits = !text.empty() && std::all_of(text.begin() + (text[0] == '-'), text.end(),
                                                     [](char c) { return c >= '0' && c <= '9'; });
    return wrong<std::int64_t>(digits && text != "-" ? "an integer of 64 bits" : "an integer", node);
  }
  // Beyond 2^53 a floating form does not name one integer.
  if (*real != std::floor(*real)) return wrong<std::int64_t>("a whole number", node);
  if (std::abs(*real) > 9007199254740992.0) return wrong<std::int64_t>("an integer, written out above 2^53", node);
  return {static_cast<std::int64_t>(*real), ""};
}

Parsed<double> parse_number(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::scalar || node.quoted) return wrong<double>("a number", node);
  const auto value = whole<double>(without_plus(node.text));
  if (!value) {
    const bool underscore = node.text.find('_') != std::string::npos;
    return wrong<double>(underscore ? "a number without _ between its digits" : "a number", node);
  }
  if (!std::isfinite(*value)) return wrong<double>("a finite number", node);
  return {*value, ""};
}

Parsed<std::string> parse_text(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::scalar) return wrong<std::string>("a text", node);
  return {node.text, ""};
}

Parsed<std::string> parse_path(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::scalar) return wrong<std::string>("a path", node);
  if (node.text.empty()) return {std::string(), ""};
  if (node.text[0] == '~' && (node.text.size() == 1 || node.text[1] == '/')) {
    return {std::nullopt, shown(node.text) + ": ~ is not expanded here; write the folder out"};
  }
  return {absolute_path(node.text, node.origin.folder()), ""};
}

std::string absolute_path(const std::string& path, const std::string& folder) {
  return (std::filesystem::path(folder) / path).lexically_normal().string();
}

bool is_library_path(const std::string& name) {
  return name.find('/') != std::string::npos || (name.size() > 3 && name.compare(name.size() - 3, 3, ".so") == 0);
}

std::string range_words(const OptionSpec& spec) {
  if (!spec.allowed.empty()) return fmt::format("one of {}", fmt::join(spec.allowed, ", "));
  const std::string low = spec.minimum ? number_text(*spec.minimum) : "",
                    high = spec.maximum ? number_text(*spec.maximum) : "";
  if (spec.minimum && spec.maximum) return spec.exclusive_minimum ? "above " + low + " up to " + high : low + " to " + high;
  if (spec.minimum) return (spec.exclusive_minimum ? "above " : "at least ") + low;
  if (spec.maximum) return "at most " + high;
  return "";
}

std::string range_fault(const OptionSpec& spec, double value) {
  const bool low = spec.minimum && (spec.exclusive_minimum ? value <= *spec.minimum : value < *spec.minimum);
  const bool high = spec.maximum && value > *spec.maximum;
  if (!low && !high) return "";
  const std::string unit = spec.unit.empty() ? "" : " " + spec.unit;
  return "out of range: expected " + range_words(spec) + unit + ", got " + number_text(value);
}

std::string allowed_fault(const OptionSpec& spec, const std::string& value) {
  if (spec.allowed.empty() || std::find(spec.allowed.begin(), spec.allowed.end(), value) != spec.allowed.end()) return "";
  const std::string near = nearest(value.substr(0, 64), spec.allowed);
  return "expected " + range_words(spec) + ", got " + shown(value) + (near.empty() ? "" : "; did you mean '" + near + "'?");
}

}  // namespace capstan
