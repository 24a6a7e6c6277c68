// defines: PluginHost, LoadedPlugin: finds, checks and loads plugin libraries, and makes what recipes choose.
#pragma once
#include "plugin/plugin_file.h"
#include "recipe/recipe.h"

#include <capstan/export.h>
#include <capstan/plugin.h>

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capstan {

/// What a run's state says of one library that it used.
struct CAPSTAN_API LoadedPlugin {
  std::string kind, name, version, file;
  std::uint64_t xxh3 = 0;  ///< of the whole file
};

/// Where plugins come from. A name that holds a '/' or ends in ".so" is the path of a library, relative to the folder
/// of the recipe that says it. Any other name is looked up by the PluginInfo inside the libraries of these folders, never
/// by file name: those that add_search_path() was given, those of CAPSTAN_PLUGIN_PATH (absolute, colons between), and
/// ../lib/capstan/plugins seen from the program. The working directory is never searched. Two real files that claim the
/// same (kind, name) are an error that names both, whatever their order.
///
/// A library is loaded on first use and stays until the process ends, also after its host is gone: objects, exceptions
/// and function objects made in it may outlive everything. All calls come from one thread.
class CAPSTAN_API PluginHost final : public Registrar, public SchemaSource {
 public:
  /// `executable_path` is this program; Error(input) when CAPSTAN_PLUGIN_PATH names a relative folder.
  explicit PluginHost(const std::string& executable_path);
  ~PluginHost() override;
  PluginHost(const PluginHost&) = delete;
  PluginHost& operator=(const PluginHost&) = delete;

  /// Error(input) unless `folder` is an absolute path of a folder that exists.
  void add_search_path(const std::string& folder) override;
  /// Loads the plugin when it is not. The reference stays valid as long as the host.
  const Schema& schema(std::string_view kind, std::string_view name, const std::string& folder) override;

  /// Libraries call it while they register; the program may add what is built into it at any time.
  void add(std::string_view kind, std::string_view name, const Schema& schema, Factory factory) override;
  /// Whatever a factory throws comes out as Error with the plugin's name, version and file added; the Fault is kept.
  std::shared_ptr<void> make(const PluginChoice& choice) override;
  PluginChoice choice(std::string_view kind, std::string_view name,
                      std::span<const std::pair<std::string, std::string>> overrides) override;

  /// The libraries loaded so far, in that order.
  std::vector<LoadedPlugin> loaded() const;
  /// Every library on the search path, fit or not, without loading any.
  std::vector<PluginFile> files() const;
  /// The folders that are searched, in order.
  const std::vector<std::string>& search_path() const { return folders_; }
  /// The text that says why `file` cannot be loaded: what, what it was built for, what this program is, what to do,
  /// where was searched. `kind` and `name` are what was asked for; either may be "".
  std::string refusal_text(const PluginFile& file, std::string_view kind, std::string_view name) const;

 private:
  using Key = std::pair<std::string, std::string>;  // (kind, name)
  struct Library {
    PluginFile file;
    std::uint64_t xxh3 = 0;
  };
  struct Entry {
    Schema schema;
    Factory factory;
    const Library* library = nullptr;  // null: built into the program
    bool unique = false;               // no second file on the search path brings it
  };

  const Entry& find(std::string_view kind, std::string_view name, const std::string& folder);
  const Entry& find_path(const std::string& kind, const std::string& name, const std::string& folder);
  const Entry& find_name(const std::string& kind, const std::string& name);
  const Library& load(const PluginFile& file, const std::string& kind, const std::string& name);
  void register_library(const Library& library, bool (*entry_point)(Registrar*, PluginError*));
  [[noreturn]] void unknown(const std::string& kind, const std::string& name, const std::vector<PluginFile>& found) const;
  [[noreturn]] void refuse(const PluginFile& file, std::string_view kind, std::string_view name, const std::string& why,
                           const std::string& advice) const;
  std::string message(const PluginFile& file, std::string_view kind, std::string_view name, const std::string& why,
                      const std::string& advice) const;
  std::string searched() const;
  std::string sdk() const;

  std::string prefix_;  // the folder above the program's
  std::vector<std::string> folders_;
  std::ptrdiff_t recipe_folders_ = 0;  // how many of them, at the front, recipes brought
  std::list<Library> libraries_;       // addresses stay
  std::map<Key, Entry> entries_;
  std::map<Key, std::string> resolved_;  // (kind, path as a recipe says it) -> real path
  const Library* registering_ = nullptr;
};

}  // namespace capstan
