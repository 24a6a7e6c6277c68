// defines: merge(), Override, apply_overrides(): how one recipe lies over another and the command line over both.
#pragma once
#include "recipe/recipe.h"
#include "recipe/yaml.h"

#include <string>
#include <vector>

namespace capstan {

/// `over` on top of `base`, both maps of `schema`: maps merge deep, lists and scalars replace. A plugin choice that
/// names another plugin than the base's drops the base's options. `source` may be null.
YamlNode merge(YamlNode base, const YamlNode& over, const Schema& schema, SchemaSource* source);

/// One "key.path=value" word.
struct Override {
  std::vector<std::string> path;
  YamlNode value;

  /// "data.sets.0.path".
  std::string key() const;
};

/// Error(input) for a word that is none.
Override parse_override(const std::string& word);

/// Puts overrides over `root`; outer keys first and a plugin's name before its options, so that the order of the
/// words does not matter. A number in a path is an index into a list that the recipe gives.
void apply_overrides(YamlNode& root, std::vector<Override> overrides, const Schema& schema, SchemaSource* source);

}  // namespace capstan
