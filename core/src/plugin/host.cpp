// The plugin host: discovery, checks, loading by Boost.DLL, and making what recipes choose.
#include "plugin/host.h"

#include <cxxabi.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <boost/dll/shared_library.hpp>
#include <boost/dll/shared_library_load_mode.hpp>

#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_SCALAR  // fast enough for a library, and GCC 12 warns of its own AVX-512 header
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>

namespace capstan {
namespace {

namespace fs = std::filesystem;

bool is_path(std::string_view name) { return name.find('/') != std::string_view::npos || name.ends_with(".so"); }

/// Opens a library for good. The handles are kept where leak checkers reach them and nothing ever closes them.
boost::dll::shared_library& open_for_ever(const std::string& path) {
  static std::mutex mutex;
  static auto* const kept = new std::deque<boost::dll::shared_library>();
  boost::dll::shared_library library(boost::dll::fs::path(path), boost::dll::load_mode::rtld_now);
  const std::lock_guard lock(mutex);
  return kept->emplace_back(std::move(library));
}

/// dlerror() names symbols as linkers do; people read them as C++.
std::string readable(std::string text) {
  constexpr std::string_view mark = "undefined symbol: ";
  const auto at = text.find(mark);
  if (at == std::string::npos) return text;
  const auto begin = at + mark.size();
  const auto end = std::min(text.find_first_of(" ,)\n", begin), text.size());
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> plain(
      abi::__cxa_demangle(text.substr(begin, end - begin).c_str(), nullptr, nullptr, &status), std::free);
  if (status == 0) text.insert(end, fmt::format(" [{}]", plain.get()));
  return text;
}

std::uint64_t hash_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (in.bad() || bytes.empty()) fail(Fault::runtime, "", fmt::format("cannot read {}: {}", path, std::strerror(errno)));
  return XXH3_64bits(bytes.data(), bytes.size());
}

void check_kind(std::string_view kind) {
  if (kind_epoch(kind) != 0) return;
  const std::string near = nearest(std::string(kind), plugin_kinds);
  fail(Fault::input, "",
       fmt::format("there is no plugin kind '{}'{}; the kinds are: {}", kind,
                   near.empty() ? "" : fmt::format(", did you mean '{}'?", near), fmt::join(plugin_kinds, ", ")));
}

}  // namespace

PluginHost::PluginHost(const std::string& executable_path) {
  std::error_code ignored;
  const fs::path real = fs::canonical(executable_path, ignored);
  prefix_ = (ignored ? fs::absolute(executable_path) : real).parent_path().parent_path().string();
  if (const char* path = std::getenv("CAPSTAN_PLUGIN_PATH")) {
    for (std::string_view rest(path); !rest.empty();) {
      const auto colon = std::min(rest.find(':'), rest.size());
      const std::string folder(rest.substr(0, colon));
      rest.remove_prefix(std::min(colon + 1, rest.size()));
      if (folder.empty()) continue;
      if (folder[0] != '/') {
        fail(Fault::input, "CAPSTAN_PLUGIN_PATH",
             fmt::format("'{}' is a relative folder: expected absolute ones, with colons "
                         "between; plugins are never looked for in the working directory",
                         folder));
      }
      folders_.push_back(folder);
    }
  }
  folders_.push_back((fs::path(prefix_) / "lib/capstan/plugins").string());
}

PluginHost::~PluginHost() = default;

void PluginHost::add_search_path(const std::string& folder) {
  std::error_code ignored;
  if (!fs::path(folder).is_absolute() || !fs::is_directory(folder, ignored)) {
    fail(Fault::input, "plugin_path", fmt::format("'{}' is no folder: expected one that holds plugins (.so)", folder));
  }
  if (std::find(folders_.begin(), folders_.end(), folder) != folders_.end()) return;
  for (auto& [key, entry] : entries_) entry.unique = false;
  // The recipe's own folders come before those of the machine.
  folders_.insert(folders_.begin() + recipe_folders_++, folder);
}

const Schema& PluginHost::schema(std::string_view kind, std::string_view name, const std::string& folder) {
  return find(kind, name, folder).schema;
}

void PluginHost::add(std::string_view kind, std::string_view name, const Schema& schema, Factory factory) {
  check_kind(kind);
  if (name.empty() || is_path(name)) {
    fail(Fault::programming, "", fmt::format("'{}' cannot be the name of a {}: it is empty or reads as a path", name, kind));
  }
  if (!factory) fail(Fault::programming, "", fmt::format("{} '{}' is registered without a factory", kind, name));
  const auto [entry, is_new] = entries_.try_emplace(Key(kind, name), Entry{schema, std::move(factory), registering_});
  if (!is_new) {
    const auto source = [](const Library* l) { return l == nullptr ? "this program" : l->file.path; };
    fail(Fault::input, "",
         fmt::format("{} '{}' is registered twice: by {} and by {}; names are unique within a kind", kind, name,
                     source(entry->second.library), source(registering_)));
  }
}

std::shared_ptr<void> PluginHost::make(const PluginChoice& choice) {
  const Entry& entry = find(choice.kind, choice.name, "");
  const auto context = [&] {
    if (entry.library == nullptr) return fmt::format("in {} '{}'", choice.kind, choice.name);
    const PluginFile& file = entry.library->file;
    return fmt::format("in {} plugin {} {} ({})", choice.kind, is_path(choice.name) ? file.name : choice.name, file.version,
                       file.path);
  };
  std::shared_ptr<void> made;
  try {
    made = entry.factory(choice.options, *this);
  } catch (const Error& e) {
    throw Error(e.fault(), fmt::format("{}\n  {}", e.what(), context()));
  } catch (const std::exception& e) {
    throw Error(Fault::runtime, fmt::format("{}\n  {}", e.what(), context()));
  } catch (...) {
    throw Error(Fault::programming, fmt::format("something was thrown that is no std::exception\n  {}", context()));
  }
  if (!made) throw Error(Fault::programming, fmt::format("the factory returned nothing\n  {}", context()));
  return made;
}

PluginChoice PluginHost::choice(std::string_view kind, std::string_view name,
                                std::span<const std::pair<std::string, std::string>> overrides) {
  std::string yaml = "{";
  for (const auto& [key, value] : overrides) yaml += fmt::format("{}{}: {}", yaml.size() > 1 ? ", " : "", key, value);
  yaml += "}";
  const Schema& options = schema(kind, name, "");
  return {std::string(kind), std::string(name), parse_options(options, yaml, this, fmt::format("{} {}", kind, name))};
}

std::vector<LoadedPlugin> PluginHost::loaded() const {
  std::vector<LoadedPlugin> all;
  for (const auto& l : libraries_) all.push_back({l.file.kind, l.file.name, l.file.version, l.file.path, l.xxh3});
  return all;
}

std::vector<PluginFile> PluginHost::files() const {
  std::vector<PluginFile> all;
  for (const auto& folder : folders_) {
    for (auto& file : scan(folder)) {
      // The same real file by two ways is one plugin.
      const bool known =
          std::any_of(all.begin(), all.end(), [&](const PluginFile& f) { return f.inode != 0 && f.same_file(file); });
      if (!known) all.push_back(std::move(file));
    }
  }
  return all;
}

const PluginHost::Entry& PluginHost::find(std::string_view kind, std::string_view name, const std::string& folder) {
  check_kind(kind);
  if (name.empty() || std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < ' ' || c == 0x7f; })) {
    fail(Fault::input, "", fmt::format("the name of a {} plugin is empty or holds control characters", kind));
  }
  const std::string of_kind(kind), named(name);
  return is_path(name) ? find_path(of_kind, named, folder) : find_name(of_kind, named);
}

const PluginHost::Entry& PluginHost::find_path(const std::string& kind, const std::string& name, const std::string& folder) {
  const auto known = resolved_.find({kind, name});
  fs::path path(name);
  if (path.is_relative()) {
    if (folder.empty() && known == resolved_.end()) {
      fail(Fault::input, "",
           fmt::format("'{}' is a relative path, and there is no recipe here that it could be relative "
                       "to; give an absolute one",
                       name));
    }
    path = folder.empty() ? fs::path(known->second) : fs::path(folder) / path;
  }
  const PluginFile file = inspect(path.lexically_normal().string());
  if (!refusal(file).empty()) throw Error(Fault::input, refusal_text(file, kind, ""));
  if (file.kind != kind) {
    refuse(file, kind, "", fmt::format("it is a plugin of kind '{}'; a {} is wanted here", file.kind, kind),
           fmt::format("name a library of kind '{}', or use this one where a {} belongs", kind, file.kind));
  }
  if (known != resolved_.end() && known->second != file.path) {
    fail(Fault::input, "",
         fmt::format("{} '{}' means two files: {} in one recipe and {} in another that it extends; "
                     "give absolute paths",
                     kind, name, known->second, file.path));
  }
  const Library& library = load(file, kind, file.name);
  resolved_[{kind, name}] = file.path;
  const Entry& entry = entries_.at({kind, library.file.name});
  return entry;
}

const PluginHost::Entry& PluginHost::find_name(const std::string& kind, const std::string& name) {
  const Key key(kind, name);
  auto known = entries_.find(key);
  if (known != entries_.end() && (known->second.unique || known->second.library == nullptr)) return known->second;

  const std::vector<PluginFile> found = files();
  const PluginFile* match = known == entries_.end() ? nullptr : &known->second.library->file;
  for (const auto& file : found) {
    if (!file.problem.empty() || file.kind != kind || file.name != name) continue;
    if (match != nullptr && !match->same_file(file)) {
      fail(Fault::input, "",
           fmt::format("{} '{}' is ambiguous: {} and {} both bring it; remove one, or name the one that "
                       "is meant by its path",
                       kind, name, match->path, file.path));
    }
    match = &file;
  }
  if (match == nullptr) unknown(kind, name, found);
  if (known == entries_.end()) {
    load(*match, kind, name);
    known = entries_.find(key);
  }
  known->second.unique = true;
  return known->second;
}

void PluginHost::unknown(const std::string& kind, const std::string& name, const std::vector<PluginFile>& found) const {
  // A library of the right file name that is no plugin at all is more likely broken than unrelated.
  for (const auto& file : found) {
    if (!file.problem.empty() && fs::path(file.path).filename() == kind + "_" + name + ".so") {
      throw Error(Fault::input, refusal_text(file, kind, name));
    }
  }
  std::set<std::string> names, kinds;
  for (const auto& file : found) {
    if (file.kind == kind) names.insert(file.name);
    if (file.name == name) kinds.insert(file.kind);
  }
  for (const auto& [key, entry] : entries_) {
    if (key.first == kind) names.insert(key.second);
    if (key.second == name) kinds.insert(key.first);
  }
  std::string text = fmt::format("there is no {} plugin '{}'", kind, name);
  if (const std::string near = nearest(name, names); !near.empty()) text += fmt::format("; did you mean '{}'?", near);
  text += names.empty() ? fmt::format("\n  there are:    none of kind {}", kind)
                        : fmt::format("\n  there are:    {}", fmt::join(names, ", "));
  if (!kinds.empty()) text += fmt::format("\n  but:          '{}' exists as {}", name, fmt::join(kinds, ", "));
  text += fmt::format(
      "\n  what to do:   correct the name, or add the folder of the library to plugin_path in the recipe"
      "\n  searched:     {}",
      searched());
  fail(Fault::input, "", text);
}

const PluginHost::Library& PluginHost::load(const PluginFile& file, const std::string& kind, const std::string& name) {
  for (const auto& library : libraries_)
    if (library.file.same_file(file)) return library;
  if (!refusal(file).empty()) throw Error(Fault::input, refusal_text(file, kind, name));

  const std::string rebuild = fmt::format("rebuild it against this program: cmake -B build -DCapstan_DIR={}", sdk());
  const std::uint64_t hash = hash_file(file.path);
  boost::dll::shared_library* library = nullptr;
  try {
    library = &open_for_ever(file.path);
  } catch (const std::exception& e) {
    refuse(file, kind, name, fmt::format("the system's loader refuses it: {}", readable(e.what())), rebuild);
  }
  const std::string use_macro = "define the plugin with CAPSTAN_PLUGIN(kind, name, version) { ... } from <capstan/plugin.h>";
  for (const char* symbol : {"capstan_plugin_info", "capstan_plugin_register"}) {
    if (!library->has(symbol)) refuse(file, kind, name, fmt::format("it does not export the symbol {}", symbol), use_macro);
  }
  // The file was read before the loader read it: what was checked must be what is loaded.
  if (std::memcmp(&library->get<const PluginInfo>("capstan_plugin_info"), file.info.data(), sizeof(PluginInfo)) != 0) {
    refuse(file, kind, name, "the file was replaced while it was loaded, or another version of it is loaded already",
           "start the program again");
  }
  const auto added = libraries_.insert(libraries_.end(), {file, hash});
  try {
    register_library(*added, library->get<bool(Registrar*, PluginError*)>("capstan_plugin_register"));
  } catch (const Error& error) {
    std::erase_if(entries_, [&](const auto& e) { return e.second.library == &*added; });
    libraries_.erase(added);
    refuse(file, kind, name, error.what(), "mend the plugin's registration (the block after CAPSTAN_PLUGIN)");
  }
  return *added;
}

void PluginHost::register_library(const Library& library, bool (*entry_point)(Registrar*, PluginError*)) {
  PluginError error{};
  const Library* const outer = std::exchange(registering_, &library);
  const bool good = entry_point(this, &error);
  registering_ = outer;
  error.text[sizeof error.text - 1] = '\0';
  if (!good)
    throw Error(Fault::input, fmt::format("its registration failed: {}", error.text[0] ? error.text : "no reason given"));
  const auto own = entries_.find({library.file.kind, library.file.name});
  if (own == entries_.end() || own->second.library != &library) {
    throw Error(Fault::input,
                fmt::format("it registers no {} '{}', which it says to be", library.file.kind, library.file.name));
  }
}

std::string PluginHost::searched() const {
  std::vector<std::string> all;
  for (const auto& folder : folders_) {
    std::error_code ignored;
    all.push_back(fs::is_directory(folder, ignored) ? folder : folder + " (no such folder)");
  }
  return fmt::format("{}", fmt::join(all, ", "));
}

std::string PluginHost::sdk() const { return (fs::path(prefix_) / "lib/cmake/Capstan").string(); }

std::string PluginHost::message(const PluginFile& file, std::string_view kind, std::string_view name, const std::string& why,
                                const std::string& advice) const {
  const std::string wanted(kind.empty() ? std::string_view(file.kind) : kind);
  const std::string named(name.empty() ? std::string_view(file.name) : name);
  const std::string own = file.kind.empty() ? wanted : file.kind;
  std::string text = "cannot load ";
  if (!wanted.empty()) text += wanted + " ";
  text += named.empty() ? "plugin" : fmt::format("plugin '{}'", named);
  text += fmt::format(" from {}: {}", file.path, why);
  text += fmt::format(
      "\n  built for:    {}",
      file.problem.empty() ? describe_build(file.core_epoch, file.kind, file.kind_epoch, file.toolchain) : "unknown");
  text += fmt::format("\n  this program: {}", describe_build(core_epoch, own, kind_epoch(own), CAPSTAN_TOOLCHAIN));
  text += fmt::format("\n  what to do:   {}\n  searched:     {}", advice, searched());
  return text;
}

std::string PluginHost::refusal_text(const PluginFile& file, std::string_view kind, std::string_view name) const {
  const std::string why = refusal(file);
  return message(file, kind, name, why,
                 file.problem.empty()
                     ? fmt::format("rebuild it against this program: cmake -B build -DCapstan_DIR={}", sdk())
                     : "put a whole plugin library there, or remove the file");
}

void PluginHost::refuse(const PluginFile& file, std::string_view kind, std::string_view name, const std::string& why,
                        const std::string& advice) const {
  throw Error(Fault::input, message(file, kind, name, why, advice));
}

}  // namespace capstan
