// `capstan plugin list|info|new`: what plugins there are, what they can be told, and the start of a new one.
#include "program/commands.h"

#include "base/look.h"
#include "plugin/host.h"
#include "recipe/recipe.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <tuple>

namespace capstan::program {
namespace {

namespace fs = std::filesystem;

struct Words {
  std::string kind, name, folder;
  std::vector<std::string> search;
};

void add_folders(PluginHost& host, const Words& words) {
  for (const auto& folder : words.search) host.add_search_path(fs::absolute(folder).lexically_normal().string());
}

void list(const Program& program, const Words& words) {
  PluginHost host(program.executable);
  add_folders(host, words);
  struct Row {
    std::string kind, name, version, file, problem;
  };
  std::vector<Row> rows;
  for (const auto& file : host.files()) {
    if (!words.kind.empty() && file.kind != words.kind && !file.kind.empty()) continue;
    const auto text = [](const std::string& s) { return s.empty() ? std::string("?") : s; };
    rows.push_back({text(file.kind), text(file.name), text(file.version), file.path, refusal(file)});
  }
  // Two libraries of one name can be listed but not used by that name.
  for (auto& a : rows) {
    for (const auto& b : rows) {
      if (&a != &b && a.problem.empty() && a.name != "?" && a.kind == b.kind && a.name == b.name) {
        a.problem = fmt::format("ambiguous: {} brings the same; name it by its path", b.file);
      }
    }
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.kind, a.name, a.file) < std::tie(b.kind, b.name, b.file);
  });
  if (rows.empty()) {
    fmt::print("no plugins{}\n  searched: {}\n", words.kind.empty() ? "" : " of kind " + words.kind,
               fmt::join(host.search_path(), ", "));
    return;
  }
  std::size_t kind_width = 4, name_width = 4, version_width = 7;
  for (const auto& r : rows) {
    kind_width = std::max(kind_width, r.kind.size());
    name_width = std::max(name_width, r.name.size());
    version_width = std::max(version_width, r.version.size());
  }
  const auto print = [&](const auto& kind, const auto& name, const auto& version, const auto& file) {
    fmt::print("{:<{}}  {:<{}}  {:<{}}  {}\n", kind, kind_width, name, name_width, version, version_width, file);
  };
  print("KIND", "NAME", "VERSION", "FILE");
  for (const auto& r : rows) {
    print(r.kind, r.name, r.version, r.file);
    if (!r.problem.empty()) fmt::print("{:<{}}  refused: {}\n", "", kind_width, r.problem);
  }
}

void print_info(PluginHost& host, const PluginFile& file, const std::string& name) {
  fmt::print("{} plugin '{}' {}\n  file:      {}\n  built for: {}\n", file.kind, file.name, file.version, file.path,
             describe_build(file.core_epoch, file.kind, file.kind_epoch, file.toolchain));
  const Schema& schema = host.schema(file.kind, name, "");
  for (const auto& loaded : host.loaded()) {
    if (loaded.file == file.path) fmt::print("  xxh3:      {:016x}\n", loaded.xxh3);
  }
  fmt::print("\n");
  if (schema.options().empty())
    fmt::print("It has no options.\n");
  else
    fmt::print("{}", help_text(schema));
}

void info(const Program& program, const Words& words) {
  PluginHost host(program.executable);
  add_folders(host, words);
  const bool is_file = words.name.find('/') != std::string::npos || words.name.ends_with(".so");
  if (is_file) {
    // What the user types is relative to where the user is.
    const PluginFile file = inspect(fs::absolute(words.name).lexically_normal().string());
    if (!refusal(file).empty()) throw Error(Fault::input, host.refusal_text(file, words.kind, ""));
    print_info(host, file, file.path);
    return;
  }
  std::vector<PluginFile> found;
  for (auto& file : host.files()) {
    if (file.problem.empty() && file.name == words.name && (words.kind.empty() || file.kind == words.kind)) {
      found.push_back(std::move(file));
    }
  }
  if (found.empty() && !words.kind.empty()) host.schema(words.kind, words.name, "");  // throws: says what there is
  if (found.empty()) {
    std::vector<std::string> names;
    for (const auto& file : host.files())
      if (file.problem.empty()) names.push_back(file.name);
    const std::string near = nearest(words.name, names);
    fail(Fault::input, "plugin info",
         fmt::format("there is no plugin '{}'{}; `capstan plugin list` shows all\n  searched: {}", words.name,
                     near.empty() ? "" : fmt::format(", did you mean '{}'?", near), fmt::join(host.search_path(), ", ")));
  }
  bool first = true;
  for (const auto& file : found) {
    if (!first) fmt::print("\n");
    first = false;
    print_info(host, file, file.name);
  }
}

/// "my_model" -> "MyModel"
std::string class_name(const std::string& name) {
  std::string out;
  bool upper = true;
  for (char c : name) {
    if (c == '_') {
      upper = true;
      continue;
    }
    out += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    upper = false;
  }
  return out;
}

std::string fill_in(std::string text, const std::string& kind, const std::string& name) {
  const std::pair<std::string_view, std::string> values[] = {{"@kind@", kind}, {"@name@", name}, {"@Name@", class_name(name)}};
  for (const auto& [mark, value] : values) {
    for (std::size_t at = 0; (at = text.find(mark, at)) != std::string::npos; at += value.size()) {
      text.replace(at, mark.size(), value);
    }
  }
  return text;
}

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in) fail(Fault::runtime, "plugin new", fmt::format("cannot read {}", path.string()));
  return text.str();
}

/// The files that a new plugin consists of, by name: those of every kind and those of its own, filled in.
std::map<std::string, std::string> new_files(const fs::path& shared, const fs::path& own, const std::string& kind, const std::string& name) {
  std::map<std::string, std::string> files;
  std::error_code error;
  for (const fs::path& folder : {shared, own}) {
    fs::directory_iterator file(folder, error);
    for (; !error && file != fs::directory_iterator(); file.increment(error)) {
      if (file->is_directory()) continue;
      const std::string target = fill_in(file->path().filename().string(), kind, name);
      if (!files.emplace(target, fill_in(read_file(file->path()), kind, name)).second)
        fail(Fault::runtime, "plugin new", fmt::format("two templates in {} and {} make the file {}: rename one; nothing was written", shared.string(), own.string(), target));
    }
    if (error) fail(Fault::runtime, "plugin new", fmt::format("cannot list {}: {}", folder.string(), error.message()));
  }
  return files;
}

/// A folder and the files in it that are taken away again, unless all of them are there.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& folder) {
    std::error_code error;
    for (fs::path missing = fs::absolute(folder).lexically_normal(); !fs::exists(missing, error) && missing != missing.root_path(); missing = missing.parent_path())
      made_.push_back(missing);
    fs::create_directories(folder, error);
    if (!error) return;
    undo();
    fail(Fault::input, "plugin new", fmt::format("cannot make the folder {}: {}; --dir says where", folder.string(), reason_and_advice(error)));
  }
  ~NewFolder() { undo(); }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  void write(const fs::path& file, const std::string& text) {
    errno = 0;
    std::ofstream out(file, std::ios::binary);
    if (out) written_.push_back(file);
    out << text;
    out.close();
    if (!out) fail(Fault::runtime, "plugin new", fmt::format("cannot write {}: {}; nothing was left behind", file.string(), std::strerror(errno)));
  }
  void keep() { made_.clear(), written_.clear(); }

 private:
  void undo() {
    std::error_code ignored;  // a folder that somebody put something into stays
    for (const fs::path& file : written_) fs::remove(file, ignored);
    for (const fs::path& folder : made_) fs::remove(folder, ignored);
  }
  std::vector<fs::path> made_, written_;  // folders from the inside out
};

void create(const Program& program, const Words& words) {
  const std::string& name = words.name;
  const bool good = !name.empty() && name.size() <= 40 && name[0] >= 'a' && name[0] <= 'z' &&
                    std::all_of(name.begin(), name.end(),
                                [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; });
  if (!good) {
    fail(Fault::input, "plugin new",
         fmt::format("'{}' cannot name a plugin here: expected at most 40 small letters, digits and "
                     "underscores, a letter first",
                     name));
  }
  std::error_code ignored;
  const fs::path real = fs::canonical(program.executable, ignored);
  const fs::path templates =
      (ignored ? fs::path(program.executable) : real).parent_path().parent_path() / "share/capstan/templates/plugin";
  const fs::path from = templates / words.kind;
  if (!fs::is_directory(from, ignored)) {
    std::vector<std::string> kinds;
    for (fs::directory_iterator i(templates, ignored), end; !ignored && i != end; i.increment(ignored)) {
      if (i->is_directory()) kinds.push_back(i->path().filename().string());  // files there are for every kind
    }
    std::sort(kinds.begin(), kinds.end());
    if (kinds.empty()) fail(Fault::runtime, "plugin new", fmt::format("no templates in {}", templates.string()));
    fail(Fault::input, "plugin new",
         fmt::format("there is no template for kind '{}'; there are: {}", words.kind, fmt::join(kinds, ", ")));
  }
  const fs::path to = words.folder.empty() ? fs::path(name) : fs::path(words.folder);
  std::error_code error;
  if (is_there(to) && !(is_folder(to) && fs::is_empty(to, error))) {
    if (error) fail(Fault::input, "plugin new", fmt::format("{} cannot be listed: {}", to.string(), reason_and_advice(error)));
    fail(Fault::input, "plugin new", fmt::format("{} exists and is not an empty folder; nothing was written", to.string()));
  }
  const auto files = new_files(templates, from, words.kind, name);
  NewFolder folder(to);
  std::vector<std::string> written;
  for (const auto& [file, text] : files) {
    folder.write(to / file, text);
    written.push_back((to / file).string());
  }
  folder.keep();
  const fs::path sdk = templates.parent_path().parent_path().parent_path().parent_path() / "lib/cmake/Capstan";
  fmt::print("wrote {}\n\nBuild it:\n  cmake -S {} -B {}/build -DCapstan_DIR={}\n  cmake --build {}/build\n",
             fmt::join(written, "\n      "), to.string(), to.string(), sdk.string(), to.string());
  fmt::print("Look at it:\n  {} plugin info {}/build/{}_{}.so\n", program.executable, to.string(), words.kind, name);
}

}  // namespace

void add_plugin(CLI::App& app, Program& program) {
  CLI::App* plugin = app.add_subcommand("plugin", "List plugins, show their options, start a new one");
  plugin->require_subcommand(1);
  const auto words = std::make_shared<Words>();
  const std::vector<std::string> kinds(plugin_kinds.begin(), plugin_kinds.end());

  CLI::App* list_command = plugin->add_subcommand("list", "Every plugin on the search path, without running its code");
  list_command->add_option("--kind", words->kind, "only this kind")->check(CLI::IsMember(kinds));
  list_command->add_option("--plugin-path", words->search, "look in this folder too (may be repeated)")
      ->allow_extra_args(false);
  list_command->callback([words, &program] { list(program, *words); });

  CLI::App* info_command = plugin->add_subcommand("info", "What a plugin is and the options that a recipe may give it");
  info_command->add_option("name", words->name, "name, or path of a library")->required();
  info_command->add_option("--kind", words->kind, "its kind, when several share the name")->check(CLI::IsMember(kinds));
  info_command->add_option("--plugin-path", words->search, "look in this folder too (may be repeated)")
      ->allow_extra_args(false);
  info_command->callback([words, &program] { info(program, *words); });

  CLI::App* new_command = plugin->add_subcommand("new", "Write the start of a plugin: build file, one source, a recipe");
  new_command->add_option("name", words->name, "small letters, digits, underscores")->required();
  new_command->add_option("--kind", words->kind, "what it is")->required()->check(CLI::IsMember(kinds));
  new_command->add_option("--dir", words->folder, "folder to write (default: ./NAME)");
  new_command->callback([words, &program] { create(program, *words); });
}

}  // namespace capstan::program
