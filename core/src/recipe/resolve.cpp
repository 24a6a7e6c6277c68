// Reads a tree of nodes by a schema: types, ranges, unknown and missing keys, plugin choices, defaults.
#include "recipe/resolve.h"

#include "recipe/options_impl.h"
#include "recipe/values.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace capstan {
namespace {

using Impl = Options::Impl;
using Type = OptionSpec::Type;

class Resolver {
 public:
  Resolver(SchemaSource* source, Findings& findings) : source_(source), findings_(findings) {}

  Options map(const YamlNode& node, const Schema& schema, const std::string& key, const std::string& title,
              bool plugin_map) {
    auto impl = std::make_shared<Impl>();
    impl->schema = std::make_shared<const Schema>(schema);
    impl->key = key;
    unknown_keys(node, schema, key, title, plugin_map);
    for (const auto& spec : schema.options()) impl->slots.push_back(slot(node, spec, join_key(key, spec.name)));
    return Options(std::move(impl));
  }

 private:
  void unknown_keys(const YamlNode& node, const Schema& schema, const std::string& key, const std::string& title,
                    bool plugin_map) {
    std::vector<std::string> known;
    for (const auto& spec : schema.options()) known.push_back(spec.name);
    for (const auto& entry : node.entries) {
      if (schema.find(entry.name) || (plugin_map && entry.name == "plugin")) continue;
      std::string message = "unknown key " + shown(entry.name) + (title.empty() ? "" : " in " + title);
      const std::string near = entry.name.size() > 64 ? "" : nearest(entry.name, known);
      if (!near.empty()) message += "; did you mean '" + near + "'?";
      message += known.empty() ? "; it has no options"
                               : fmt::format("{} known: {}", near.empty() ? ";" : "", fmt::join(known, ", "));
      findings_.add(entry.origin, key, message);
    }
  }

  Impl::Slot slot(const YamlNode& map, const OptionSpec& spec, const std::string& key) {
    check_spec(spec, key);
    if (const auto* entry = map.find(spec.name)) {
      const YamlNode* name = spec.type == Type::plugin ? plugin_name(entry->value) : nullptr;
      const bool unnamed = spec.type == Type::plugin && !name;  // the options were given, the plugin is the default one
      return {value(entry->value, spec, key), name ? name->origin : unnamed ? Origin{} : entry->value.origin};
    }
    if (spec.optional) return {{}, Origin{}};
    if (spec.required) {
      // A file's map starts at its first key; the reader looks for the key that is not there.
      findings_.add(map.origin, key, missing(spec));
      return {{}, map.origin};
    }
    YamlNode node = spec.type == Type::text || spec.type == Type::path ? default_text(spec, key) : default_value(spec, key);
    // What is required in a group or plugin that the recipe does not mention is missing from the outer map.
    if (spec.type == Type::group || spec.type == Type::plugin) node.origin = map.origin;
    return {value(node, spec, key), Origin{}};
  }

  static std::string missing(const OptionSpec& spec) {
    std::string message = "missing; expected " + type_words(spec.type);
    if (spec.type == Type::plugin) message = "missing; expected the name of a plugin of kind " + spec.plugin_kind;
    if (const std::string range = range_words(spec); !range.empty()) message += ", " + range;
    return message + (spec.help.empty() ? "" : ": " + spec.help);
  }

  static void check_spec(const OptionSpec& spec, const std::string& key) {
    if ((spec.type == Type::group || spec.type == Type::groups) && !spec.group)
      fail(Fault::programming, key, "declared as " + type_words(spec.type) + " without a schema: set OptionSpec::group");
    if ((spec.type == Type::plugin || spec.type == Type::plugins) && spec.plugin_kind.empty())
      fail(Fault::programming, key, "declared as " + type_words(spec.type) + " without a kind: set OptionSpec::plugin_kind");
  }

  static YamlNode default_text(const OptionSpec& spec, const std::string& key) {
    return spec.default_text.empty() ? parse_yaml_value("\"\"", Origin{}) : default_value(spec, key);
  }

  static YamlNode default_value(const OptionSpec& spec, const std::string& key) {
    try {
      return parse_yaml_value(spec.default_text, Origin{});
    } catch (const Error& e) {
      fail(Fault::programming, key, "the declared default is not YAML: " + std::string(e.what()));
    }
  }

  Impl::Value value(const YamlNode& node, const OptionSpec& spec, const std::string& key) {
    switch (spec.type) {
      case Type::flag:
        return scalar(parse_flag(node), node, spec, key);
      case Type::integer:
        return scalar(parse_integer(node), node, spec, key);
      case Type::number:
        return scalar(parse_number(node), node, spec, key);
      case Type::text:
        return scalar(parse_text(node), node, spec, key);
      case Type::path:
        return scalar(parse_path(node), node, spec, key);
      case Type::integers:
        return list<std::int64_t>(node, spec, key, parse_integer);
      case Type::numbers:
        return list<double>(node, spec, key, parse_number);
      case Type::texts:
        return list<std::string>(node, spec, key, parse_text);
      case Type::paths:
        return list<std::string>(node, spec, key, parse_path);
      case Type::plugin: {
        auto choice = plugin(node, spec, key);
        if (choice) return std::move(*choice);
        return {};
      }
      case Type::plugins: {
        std::vector<PluginChoice> choices;
        if (!expect_list(node, spec, key)) return choices;
        for (std::size_t i = 0; i < node.items.size(); ++i) {
          if (auto choice = plugin(node.items[i], spec, join_key(key, std::to_string(i))))
            choices.push_back(std::move(*choice));
        }
        return choices;
      }
      case Type::group:
        return group(node, spec, key);
      case Type::groups: {
        std::vector<Options> groups;
        if (!expect_list(node, spec, key)) return groups;
        for (std::size_t i = 0; i < node.items.size(); ++i) {
          groups.push_back(group(node.items[i], spec, join_key(key, std::to_string(i))));
        }
        return groups;
      }
    }
    return {};
  }

  /// Every fault of a value goes through here; one in a default is the declaration's.
  void fault(const Origin& origin, const std::string& key, const std::string& message) {
    if (origin.kind == Origin::Kind::default_value) fail(Fault::programming, key, "the declared default: " + message);
    findings_.add(origin, key, message);
  }

  static std::string outside(const OptionSpec& spec, double value) { return range_fault(spec, value); }
  static std::string outside(const OptionSpec& spec, std::int64_t value) { return range_fault(spec, double(value)); }
  static std::string outside(const OptionSpec&, bool) { return ""; }
  static std::string outside(const OptionSpec& spec, const std::string& value) { return allowed_fault(spec, value); }

  template <class T>
  Impl::Value scalar(Parsed<T> parsed, const YamlNode& node, const OptionSpec& spec, const std::string& key) {
    if (!parsed.value) {
      fault(node.origin, key, parsed.why + with_unit(spec));
      return {};
    }
    if (const std::string why = outside(spec, *parsed.value); !why.empty()) fault(node.origin, key, why);
    return std::move(*parsed.value);
  }

  template <class T>
  Impl::Value list(const YamlNode& node, const OptionSpec& spec, const std::string& key,
                   Parsed<T> (*parse)(const YamlNode&)) {
    std::vector<T> values;
    if (!expect_list(node, spec, key)) return values;
    for (std::size_t i = 0; i < node.items.size(); ++i) {
      const std::string item_key = join_key(key, std::to_string(i));
      Parsed<T> parsed = parse(node.items[i]);
      if (!parsed.value) {
        fault(node.items[i].origin, item_key, parsed.why + with_unit(spec));
      } else if (const std::string why = outside(spec, *parsed.value); !why.empty()) {
        fault(node.items[i].origin, item_key, why);
      } else {
        values.push_back(std::move(*parsed.value));
      }
    }
    return values;
  }

  static std::string with_unit(const OptionSpec& spec) { return spec.unit.empty() ? "" : " (in " + spec.unit + ")"; }

  bool expect_list(const YamlNode& node, const OptionSpec& spec, const std::string& key) {
    if (node.kind == YamlNode::Kind::list) return true;
    fault(node.origin, key, "expected " + type_words(spec.type) + ", got " + node.describe() + "; write [...]");
    return false;
  }

  Options group(const YamlNode& node, const OptionSpec& spec, const std::string& key) {
    if (node.kind == YamlNode::Kind::map) return map(node, *spec.group, key, key, false);
    fault(node.origin, key, "expected a map of its keys, got " + node.describe());
    return {};
  }

  std::optional<PluginChoice> plugin(const YamlNode& node, const OptionSpec& spec, const std::string& key) {
    if (node.kind != YamlNode::Kind::scalar && node.kind != YamlNode::Kind::map) {
      fault(node.origin, key,
            fmt::format("expected the name of a plugin of kind {} or {{plugin: NAME, ...}}, got {}", spec.plugin_kind,
                        node.describe()));
      return std::nullopt;
    }
    // Options without a name go to the default plugin: `optimizer: {lr: 1e-3}`.
    YamlNode fallback;
    const YamlNode* name = plugin_name(node);
    if (!name && !spec.default_text.empty() && spec.type == Type::plugin) {
      fallback = parse_yaml_value(spec.default_text, Origin{});
      name = plugin_name(fallback);
    }
    if (!name) {
      fault(node.origin, key, "no plugin is named; expected 'plugin: NAME' with one of kind " + spec.plugin_kind);
      return std::nullopt;
    }
    if (name->kind != YamlNode::Kind::scalar || name->text.empty()) {
      fault(name->origin, key, "expected the name of a plugin of kind " + spec.plugin_kind + ", got " + name->describe());
      return std::nullopt;
    }
    PluginChoice choice{spec.plugin_kind, plugin_reference(name->text, name->origin), {}};
    if (!source_) {
      findings_.add(name->origin, key, "no plugins are known here; got " + shown(name->text));
      return std::nullopt;
    }
    const Schema* schema = nullptr;
    try {
      schema = &source_->schema(choice.kind, choice.name, name->origin.folder());
    } catch (const Error& e) {
      if (e.fault() != Fault::input) throw;
      findings_.add(name->origin, key, e.what());
      return std::nullopt;
    }
    if (node.kind == YamlNode::Kind::map) {
      choice.options = map(node, *schema, key, key + " (" + name->text + ")", true);
    } else {
      YamlNode empty;
      empty.kind = YamlNode::Kind::map;
      empty.origin = node.origin;
      choice.options = map(empty, *schema, key, key + " (" + name->text + ")", true);
    }
    return choice;
  }

  SchemaSource* source_;
  Findings& findings_;
};

}  // namespace

SchemaSource::~SchemaSource() = default;

void Findings::add(const Origin& origin, const std::string& key, const std::string& message) {
  texts_.push_back("[" + where_text(origin, key) + "] " + message);
}

void Findings::add(const std::string& text) { texts_.push_back(text); }

void Findings::throw_if_any() const {
  constexpr std::size_t most = 20;
  if (texts_.empty()) return;
  if (texts_.size() == 1) throw Error(Fault::input, texts_.front());
  std::string all = fmt::format("{} things are wrong in the recipe:", texts_.size());
  for (std::size_t i = 0; i < std::min(most, texts_.size()); ++i) all += "\n  " + texts_[i];
  if (texts_.size() > most) all += fmt::format("\n  and {} more", texts_.size() - most);
  throw Error(Fault::input, all);
}

Options resolve(const YamlNode& map, const Schema& schema, const std::string& key, const std::string& title,
                SchemaSource* source, Findings& findings) {
  return Resolver(source, findings).map(map, schema, key, title, false);
}

const YamlNode* plugin_name(const YamlNode& choice) {
  if (choice.kind == YamlNode::Kind::scalar) return &choice;
  const auto* entry = choice.find("plugin");
  return entry ? &entry->value : nullptr;
}

std::string plugin_reference(const std::string& name, const Origin& origin) {
  return is_library_path(name) ? absolute_path(name, origin.folder()) : name;
}

}  // namespace capstan
