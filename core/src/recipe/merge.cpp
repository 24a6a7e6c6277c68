// Lays trees of nodes over each other: a recipe over the one it extends, the command line over both.
#include "recipe/merge.h"

#include "recipe/options_impl.h"
#include "recipe/resolve.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

namespace capstan {
namespace {

using Type = OptionSpec::Type;

/// What is known of the place where two values meet.
struct Place {
  const Schema* schema = nullptr;      ///< of a map
  const OptionSpec* choice = nullptr;  ///< the place holds a plugin choice
  const OptionSpec* list = nullptr;    ///< the place holds a list
};

Place place_of(const OptionSpec* spec) {
  Place place;
  if (!spec) return place;
  if (spec->type == Type::group) place.schema = spec->group.get();
  if (spec->type == Type::plugin) place.choice = spec;
  if (spec->type == Type::groups || spec->type == Type::plugins) place.list = spec;
  return place;
}

Place element_of(const Place& list) {
  Place place;
  if (list.list && list.list->type == Type::groups) place.schema = list.list->group.get();
  if (list.list && list.list->type == Type::plugins) place.choice = list.list;
  return place;
}

Origin command_line() { return {Origin::Kind::command_line, "", 0}; }

YamlNode map_of(const std::string& name, YamlNode value) {
  YamlNode map;
  map.kind = YamlNode::Kind::map;
  map.origin = value.origin;
  map.entries.push_back({name, value.origin, std::move(value)});
  return map;
}

class Merger {
 public:
  explicit Merger(SchemaSource* source) : source_(source) {}

  YamlNode value(YamlNode base, const YamlNode& over, const Place& place) {
    const bool choice = place.choice || (!place.schema && (base.find("plugin") || over.find("plugin")));
    if (choice) return plugin(std::move(base), over, place.choice);
    if (base.kind == YamlNode::Kind::map && over.kind == YamlNode::Kind::map)
      return map(std::move(base), over, place.schema);
    return over;
  }

  void apply(YamlNode& node, const Override& override, std::size_t from, Place place) {
    const auto& path = override.path;
    const auto index = std::find_if(path.begin() + static_cast<std::ptrdiff_t>(from), path.end(), is_index);
    if (index == path.end()) {
      YamlNode over = override.value;
      for (std::size_t i = path.size(); i > from; --i) over = map_of(path[i - 1], std::move(over));
      node = value(std::move(node), over, place);
      return;
    }
    const auto at = static_cast<std::size_t>(index - path.begin());
    YamlNode* list = &node;
    for (std::size_t i = from; i < at; ++i) {
      place = inner(*list, place, path[i]);
      auto* entry = list->kind == YamlNode::Kind::map ? list->find(path[i]) : nullptr;
      if (!entry) refuse_index(override, at);
      list = &entry->value;
    }
    if (list->kind != YamlNode::Kind::list) refuse_index(override, at);
    const std::size_t count = list->items.size();
    const std::size_t i = path[at].size() > 9 ? count : std::stoul(path[at]);
    if (i >= count) {
      fail(Fault::input, "command line, " + override.key(),
           fmt::format("there is no element {}: {} holds {}, counted from 0", path[at], fmt::join(path.begin(), index, "."),
                       count));
    }
    apply(list->items[i], override, at + 1, element_of(place));
  }

 private:
  static bool is_index(const std::string& part) {
    return std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
  }

  [[noreturn]] static void refuse_index(const Override& override, std::size_t at) {
    const std::string list =
        fmt::format("{}", fmt::join(override.path.begin(), override.path.begin() + std::ptrdiff_t(at), "."));
    fail(Fault::input, "command line, " + override.key(),
         list.empty() ? "a key starts with a name, not with a number"
                      : "the recipe gives no list '" + list + "' to index; give all of it: " + list + "=[...]");
  }

  /// The place of `name` within a map or plugin choice.
  Place inner(const YamlNode& node, const Place& place, const std::string& name) {
    const Schema* schema = place.schema;
    if (place.choice) {
      const YamlNode* plugin = plugin_name(node);
      const std::string named = plugin && plugin->kind == YamlNode::Kind::scalar
                                    ? plugin_reference(plugin->text, plugin->origin)
                                    : default_name(place.choice);
      schema = schema_of(place.choice, named, node.origin);
    }
    return place_of(schema ? schema->find(name) : nullptr);
  }

  YamlNode map(YamlNode base, const YamlNode& over, const Schema* schema) {
    for (const auto& entry : over.entries) {
      auto* mine = base.find(entry.name);
      if (!mine) {
        base.entries.push_back(entry);
        continue;
      }
      mine->value = value(std::move(mine->value), entry.value, place_of(schema ? schema->find(entry.name) : nullptr));
      mine->origin = entry.origin;
    }
    if (over.origin.kind == Origin::Kind::file) base.origin = over.origin;
    return base;
  }

  static std::string default_name(const OptionSpec* choice) {
    return choice && choice->type == Type::plugin ? choice->default_text : "";
  }

  static bool can_choose(const YamlNode& node) {
    if (node.kind != YamlNode::Kind::scalar && node.kind != YamlNode::Kind::map) return false;
    const YamlNode* name = plugin_name(node);
    return !name || name->kind == YamlNode::Kind::scalar;
  }

  YamlNode plugin(YamlNode base, const YamlNode& over, const OptionSpec* choice) {
    if (!can_choose(base) || !can_choose(over)) return over;
    const YamlNode* base_name = plugin_name(base);
    const YamlNode* over_name = plugin_name(over);
    const std::string before = base_name ? plugin_reference(base_name->text, base_name->origin) : default_name(choice);
    const std::string after = over_name ? plugin_reference(over_name->text, over_name->origin) : before;
    if (!before.empty() && before != after) return over;
    const Origin origin = base.origin;
    const Schema* schema = schema_of(choice, after, over.origin);
    const auto as_map = [](const YamlNode& node) {
      return node.kind == YamlNode::Kind::map ? node : map_of("plugin", node);
    };
    YamlNode merged = map(as_map(base), as_map(over), schema);
    if (over.origin.kind != Origin::Kind::file) merged.origin = origin;
    return merged;
  }

  /// Only to know what lies deeper; a plugin that cannot be had is told of when the whole is resolved.
  const Schema* schema_of(const OptionSpec* choice, const std::string& name, const Origin& origin) {
    if (!choice || !source_ || name.empty()) return nullptr;
    try {
      return &source_->schema(choice->plugin_kind, name, origin.folder());
    } catch (const Error& e) {
      if (e.fault() != Fault::input) throw;
      return nullptr;
    }
  }

  SchemaSource* source_;
};

}  // namespace

YamlNode merge(YamlNode base, const YamlNode& over, const Schema& schema, SchemaSource* source) {
  Place place;
  place.schema = &schema;
  return Merger(source).value(std::move(base), over, place);
}

std::string Override::key() const { return fmt::format("{}", fmt::join(path, ".")); }

Override parse_override(const std::string& word) {
  const std::size_t equals = word.find('=');
  if (equals == std::string::npos || equals == 0) {
    fail(Fault::input, "command line", shown(word) + " is no override; expected key.path=value, such as train.steps=100");
  }
  Override override;
  const std::string key = word.substr(0, equals);
  for (std::size_t start = 0; start <= key.size();) {
    const std::size_t dot = std::min(key.find('.', start), key.size());
    if (dot == start)
      fail(Fault::input, "command line", "the key " + shown(key) + " has an empty part; expected key.path=value");
    override.path.push_back(key.substr(start, dot - start));
    start = dot + 1;
  }
  if (override.path.size() > static_cast<std::size_t>(YamlLimits{}.depth)) {
    fail(Fault::input, "command line", "the key " + shown(key) + " is too deep");
  }
  if (override.path[0] == "extends") {
    fail(Fault::input, "command line, extends", "a recipe extends another one in its file only; write it there");
  }
  try {
    override.value = parse_yaml_value(word.substr(equals + 1), command_line());
  } catch (const Error& e) {
    fail(Fault::input, "command line, " + shown(key), e.what());
  }
  return override;
}

void apply_overrides(YamlNode& root, std::vector<Override> overrides, const Schema& schema, SchemaSource* source) {
  const auto rank = [](const Override& o) {
    return 2 * o.path.size() - (o.path.size() > 1 && o.path.back() == "plugin" ? 2 : 0);
  };
  std::stable_sort(overrides.begin(), overrides.end(),
                   [&](const Override& a, const Override& b) { return rank(a) < rank(b); });
  Place place;
  place.schema = &schema;
  for (const auto& override : overrides) Merger(source).apply(root, override, 0, place);
}

}  // namespace capstan
