// defines: Schema (what a plugin or a part of core can be told) and Options (what a recipe told it).
// A plugin declares its options once; core parses recipes by the declaration, strictly, and prints help,
// documentation and completions from it. Nothing reads YAML anywhere else.
#pragma once
#include <capstan/error.h>
#include <capstan/export.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

class Schema;

/// One declared option.
struct CAPSTAN_API OptionSpec {
  enum class Type : std::uint8_t {
    flag, integer, number, text, path,          // scalars; a path is relative to the file that says it
    integers, numbers, texts, paths,            // lists of scalars
    plugin,                                     // {plugin: NAME, ...its own options}, or just NAME
    plugins,                                    // a list of such choices
    group,                                      // a nested map with a schema of its own
    groups,                                     // a list of such maps
  };
  std::string name, help, unit;
  Type type = Type::text;
  bool required = false;                        ///< no default: absent is an error
  bool optional = false;                        ///< may be absent, with no default: ask has()
  std::string default_text;                     ///< as YAML text; "" with required or optional
  std::optional<double> minimum, maximum;       ///< inclusive, on numbers and list elements
  bool exclusive_minimum = false;
  std::vector<std::string> allowed;             ///< on text: one of these
  std::string plugin_kind;                      ///< on plugin(s): "optimizer", "layer", ...
  std::shared_ptr<const Schema> group;          ///< on group(s)

  OptionSpec& range(double low, double high) { minimum = low, maximum = high; return *this; }
  OptionSpec& at_least(double low) { minimum = low; return *this; }
  OptionSpec& above(double low) { minimum = low, exclusive_minimum = true; return *this; }
  OptionSpec& one_of(std::vector<std::string> values) { allowed = std::move(values); return *this; }
  OptionSpec& in(std::string u) { unit = std::move(u); return *this; }
};

/// An ordered list of options. The returned reference is valid until the next call.
class CAPSTAN_API Schema {
 public:
  OptionSpec& flag(std::string name, bool default_value, std::string help);
  OptionSpec& integer(std::string name, std::int64_t default_value, std::string help);
  OptionSpec& number(std::string name, double default_value, std::string help);
  OptionSpec& text(std::string name, std::string default_value, std::string help);
  OptionSpec& path(std::string name, std::string default_value, std::string help);
  /// A list; `default_text` is YAML, "[]" for instance.
  OptionSpec& list(OptionSpec::Type type, std::string name, std::string default_text, std::string help);
  /// `default_plugin` "" makes it required.
  OptionSpec& plugin(std::string kind, std::string name, std::string default_plugin, std::string help);
  OptionSpec& plugins(std::string kind, std::string name, std::string help);
  OptionSpec& group(std::string name, Schema schema, std::string help);
  OptionSpec& groups(std::string name, Schema schema, std::string help);
  /// An option with no default that must be given (required) or may be absent (optional).
  OptionSpec& required(OptionSpec::Type type, std::string name, std::string help);
  OptionSpec& optional(OptionSpec::Type type, std::string name, std::string help);

  const std::vector<OptionSpec>& options() const { return options_; }
  const OptionSpec* find(std::string_view name) const;

 private:
  OptionSpec& add(OptionSpec spec);
  std::vector<OptionSpec> options_;
};

class Options;

/// A resolved plugin choice: the plugin's name (or path) and its parsed options.
struct PluginChoice;

/// The values of one schema, complete with defaults. Asking for a name that the schema does not declare,
/// or with another type, is Error(programming). The plain values come from core's recipe parser.
class CAPSTAN_API Options {
 public:
  Options();
  ~Options();
  Options(const Options&);
  Options& operator=(const Options&);
  Options(Options&&) noexcept;
  Options& operator=(Options&&) noexcept;

  bool flag(std::string_view name) const;
  std::int64_t integer(std::string_view name) const;
  double number(std::string_view name) const;
  const std::string& text(std::string_view name) const;
  const std::string& path(std::string_view name) const;  ///< absolute or relative to the working directory
  const std::vector<std::int64_t>& integers(std::string_view name) const;
  const std::vector<double>& numbers(std::string_view name) const;
  const std::vector<std::string>& texts(std::string_view name) const;
  const std::vector<std::string>& paths(std::string_view name) const;
  const PluginChoice& plugin(std::string_view name) const;
  const std::vector<PluginChoice>& plugins(std::string_view name) const;
  const Options& group(std::string_view name) const;
  const std::vector<Options>& groups(std::string_view name) const;
  /// Whether an optional option was given.
  bool has(std::string_view name) const;

  /// "recipes/quickstart.yaml:12, model.layers": for a plugin's own range errors.
  std::string where(std::string_view name) const;
  /// Throws Error(input) at where(name).
  [[noreturn]] void refuse(std::string_view name, const std::string& why) const;

  struct Impl;
  explicit Options(std::shared_ptr<const Impl> impl);
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

struct CAPSTAN_API PluginChoice {
  std::string kind, name;
  Options options;
};

}  // namespace capstan
