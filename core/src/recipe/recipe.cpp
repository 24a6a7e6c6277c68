// Loads a recipe: the chain of files it extends, the command line over them, the strict reading by schema.
#include "recipe/recipe.h"

#include "recipe/merge.h"
#include "recipe/options_impl.h"
#include "recipe/resolve.h"
#include "recipe/values.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

namespace capstan {
namespace {

namespace fs = std::filesystem;

/// One file of a chain, its `extends` taken out.
struct Document {
  std::string path;
  YamlNode root;
};

std::string identity(const std::string& path) {
  std::error_code error;
  const fs::path real = fs::weakly_canonical(path, error);
  return error ? path : real.string();
}

/// The file that `document` extends, or "" where it extends none.
std::string take_extends(Document& document) {
  auto& entries = document.root.entries;
  const auto at = std::find_if(entries.begin(), entries.end(), [](const YamlNode::Entry& e) { return e.name == "extends"; });
  if (at == entries.end()) return "";
  const YamlNode value = std::move(at->value);
  entries.erase(at);
  const std::string where = where_text(value.origin, "extends");
  if (value.kind != YamlNode::Kind::scalar || value.text.empty()) {
    fail(Fault::input, where, "expected the path of one recipe file, got " + value.describe());
  }
  const std::string base = (fs::path(document.path).parent_path() / value.text).lexically_normal().string();
  std::error_code error;
  if (fs::status(base, error).type() == fs::file_type::not_found)  // what may not be looked at is refused when it is read
    fail(Fault::input, where, "there is no file " + shown(base) + " (the path is relative to this recipe)");
  return base;
}

/// All files of a recipe, the outermost base first.
std::vector<Document> read_chain(const std::string& path) {
  constexpr std::size_t most = 16;
  std::vector<Document> chain;
  std::vector<std::string> seen;
  for (std::string next = path; !next.empty();) {
    seen.push_back(identity(next));
    chain.push_back({next, read_yaml_file(next)});
    Document& document = chain.back();
    const auto* extends = document.root.find("extends");
    const Origin origin = extends ? extends->value.origin : Origin{};
    next = take_extends(document);
    if (next.empty()) break;
    if (std::find(seen.begin(), seen.end(), identity(next)) != seen.end()) {
      std::vector<std::string> names;
      for (const auto& one : chain) names.push_back(one.path);
      fail(Fault::input, where_text(origin, "extends"),
           fmt::format("a circle: {} -> {}; a recipe cannot extend itself", fmt::join(names, " -> "), next));
    }
    if (chain.size() >= most) {
      fail(Fault::input, where_text(origin, "extends"), fmt::format("more than {} recipes extend each other", most));
    }
  }
  std::reverse(chain.begin(), chain.end());
  return chain;
}

/// Plugins must be found before anything that they declare can be read, so plugin_path goes ahead of the rest.
/// Faults in it are left to the strict reading.
void add_search_paths(const std::vector<Document>& chain, const std::vector<Override>& overrides, const Schema& root,
                      SchemaSource& source) {
  const OptionSpec* spec = root.find("plugin_path");
  if (!spec || spec->type != OptionSpec::Type::paths) return;
  YamlNode all;
  all.kind = YamlNode::Kind::map;
  for (const auto& document : chain) {
    const auto* entry = document.root.find(spec->name);
    if (!entry) continue;
    all.entries.clear();
    all.entries.push_back(*entry);
  }
  std::vector<Override> mine;
  std::copy_if(overrides.begin(), overrides.end(), std::back_inserter(mine),
               [&](const Override& o) { return o.path[0] == spec->name; });
  apply_overrides(all, std::move(mine), root, nullptr);
  const auto* entry = all.find(spec->name);
  if (!entry || entry->value.kind != YamlNode::Kind::list) return;
  for (const auto& item : entry->value.items) {
    const auto folder = parse_path(item);
    if (!folder.value || folder.value->empty()) continue;
    try {
      source.add_search_path(*folder.value);
    } catch (const Error& e) {
      if (e.fault() != Fault::input) throw;
      fail(Fault::input, where_text(item.origin, "plugin_path"), e.what());
    }
  }
}

}  // namespace

Recipe load_recipe(const std::string& path, const std::vector<std::string>& overrides, const Schema& root,
                   SchemaSource& source) {
  std::vector<Override> over;
  for (const auto& word : overrides) over.push_back(parse_override(word));
  std::vector<Document> chain = read_chain(path);
  add_search_paths(chain, over, root, source);

  Recipe recipe;
  recipe.path = path;
  recipe.overrides = overrides;
  YamlNode whole = std::move(chain.front().root);
  recipe.files.push_back(chain.front().path);
  for (std::size_t i = 1; i < chain.size(); ++i) {
    whole = merge(std::move(whole), chain[i].root, root, &source);
    recipe.files.push_back(chain[i].path);
  }
  apply_overrides(whole, std::move(over), root, &source);

  Findings findings;
  recipe.options = resolve(whole, root, "", "", &source, findings);
  findings.throw_if_any();
  return recipe;
}

Options parse_options(const Schema& schema, const std::string& yaml, SchemaSource* source, const std::string& name) {
  const Origin origin{Origin::Kind::file, name, 1};
  const bool blank = yaml.find_first_not_of(" \t\r\n") == std::string::npos;
  const YamlNode map = parse_yaml(blank ? "{}" : yaml, origin);
  Findings findings;
  Options options = resolve(map, schema, "", "", source, findings);
  findings.throw_if_any();
  return options;
}

}  // namespace capstan
