// defines: Findings, resolve(): a tree of nodes read by a schema into Options.
#pragma once
#include "recipe/recipe.h"
#include "recipe/yaml.h"

#include <string>
#include <vector>

namespace capstan {

/// What is wrong, gathered so that one run shows it all.
class Findings {
 public:
  void add(const Origin& origin, const std::string& key, const std::string& message);
  /// Takes over a text that already says where.
  void add(const std::string& text);
  bool empty() const { return texts_.empty(); }
  /// Throws Error(input) when there is any finding.
  void throw_if_any() const;

 private:
  std::vector<std::string> texts_;
};

/// Reads `map` strictly by `schema`. `title` names the map in messages ("model (gpt)"), `key` is its path. Findings
/// leave gaps in the result: it is only for use when there are none. `source` may be null: then no plugin is known.
Options resolve(const YamlNode& map, const Schema& schema, const std::string& key, const std::string& title,
                SchemaSource* source, Findings& findings);

/// The plugin's name in a choice (`name` or `{plugin: name, ...}`), or null where it names none.
const YamlNode* plugin_name(const YamlNode& choice);

/// What the plugin host is asked for: the absolute path where the name is one, else the name.
std::string plugin_reference(const std::string& name, const Origin& origin);

}  // namespace capstan
