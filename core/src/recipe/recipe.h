// defines: Recipe, load_recipe(), SchemaSource: a recipe read strictly, by the schemas of core and of the plugins it names.
#pragma once
#include <capstan/export.h>
#include <capstan/options.h>

#include <string>
#include <string_view>
#include <vector>

namespace capstan {

/// Where the schemas of plugins come from; the plugin host is one.
class CAPSTAN_API SchemaSource {
 public:
  virtual ~SchemaSource();
  /// A folder named by the recipe's plugin_path, absolute; called before any schema() of that recipe.
  virtual void add_search_path(const std::string& folder) = 0;
  /// The options of a plugin, valid as long as the source. `name` is a name or the absolute path of a library;
  /// `folder` is that of the file which names it. No such plugin is Error(input).
  virtual const Schema& schema(std::string_view kind, std::string_view name, const std::string& folder) = 0;
};

/// A recipe after extends, overrides and defaults.
struct CAPSTAN_API Recipe {
  Options options;                     ///< complete
  std::string path;                    ///< as given to load_recipe()
  std::vector<std::string> files;      ///< all files read, the base first, `path` last
  std::vector<std::string> overrides;  ///< as given
};

/// Reads a recipe. `overrides` are "key.path=value" words, whose order matters only between two of the same key;
/// they beat the file, which beats what it extends. Paths are relative to the file that says them, those of
/// overrides to the working directory. All that is wrong is Error(input) with file:line and key, several
/// findings in one message.
CAPSTAN_API Recipe load_recipe(const std::string& path, const std::vector<std::string>& overrides, const Schema& root,
                               SchemaSource& source);

/// The options of one schema from YAML text such as "{lr: 1e-3}"; `name` stands for the file in messages. Without a
/// source a plugin choice is Error(input).
CAPSTAN_API Options parse_options(const Schema& schema, const std::string& yaml, SchemaSource* source = nullptr,
                                  const std::string& name = "options");

/// The same options but for the path `name` of a group.
CAPSTAN_API Options with_path(const Options& options, std::string_view group, std::string_view name, std::string path);

enum class Origins : bool { hide, show };

/// The whole resolved recipe as YAML, every default written out, paths absolute. Loading the text gives the same
/// options. With Origins::show each line ends in a comment that says where its value comes from.
CAPSTAN_API std::string to_yaml(const Options& options, Origins origins = Origins::hide);
CAPSTAN_API std::string to_yaml(const Recipe& recipe, Origins origins = Origins::hide);

/// The same options as one JSON object; an optional one that was not given is null.
CAPSTAN_API std::string to_json(const Options& options);

/// xxh3 of to_yaml(), 16 hexadecimal digits. Comments, order and spelling in the files do not change it; a value does.
CAPSTAN_API std::string recipe_digest(const Options& options);

/// The options of a schema for a terminal: name, type, default, range, help; groups indented under theirs.
CAPSTAN_API std::string help_text(const Schema& schema);
/// The same as one Markdown table; names of nested options are full paths.
CAPSTAN_API std::string help_markdown(const Schema& schema);

}  // namespace capstan
