// defines: Options::Impl: values beside the schema that declares them, each with its origin.
#pragma once
#include "recipe/yaml.h"

#include <capstan/options.h>

#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace capstan {

struct Options::Impl {
  using Value =
      std::variant<std::monostate, bool, std::int64_t, double, std::string, std::vector<std::int64_t>, std::vector<double>,
                   std::vector<std::string>, PluginChoice, std::vector<PluginChoice>, Options, std::vector<Options>>;
  struct Slot {
    Value value;  ///< monostate: an optional option that was not given
    Origin origin;
  };

  std::shared_ptr<const Schema> schema;
  std::string key;          ///< full path of this map, "model.layers"; "" at the root
  std::vector<Slot> slots;  ///< parallel to schema->options()
};

/// "model" + "layers" = "model.layers".
std::string join_key(const std::string& path, const std::string& name);

/// "recipes/quickstart.yaml:12, model.layers"; "model.layers (default)".
std::string where_text(const Origin& origin, const std::string& key);

/// A word for a type in messages: "an integer", "a list of paths".
std::string type_words(OptionSpec::Type type);

}  // namespace capstan
