// defines: SchemaSource: where the recipe parser gets the declared options of a plugin that a recipe names.
#pragma once
#include <capstan/export.h>
#include <capstan/options.h>

#include <string>

namespace capstan {

class CAPSTAN_API SchemaSource {
 public:
  virtual ~SchemaSource();
  /// Adds a folder that plugins are looked for in (the recipe's `plugin_path`), as an absolute path.
  virtual void add_search_path(const std::string& dir) = 0;
  /// The declared options of plugin `name` (or the library at path `name`, relative to `relative_to_dir`) of `kind`.
  virtual const Schema& schema(const std::string& kind, const std::string& name, const std::string& relative_to_dir) = 0;
};

}  // namespace capstan
