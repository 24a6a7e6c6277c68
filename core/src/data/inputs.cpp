// Finding input files: folders and patterns.
#include "data/inputs.h"

#include <capstan/error.h>
#include <fmt/format.h>
#include <fnmatch.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

namespace capstan::data {
namespace {

namespace fs = std::filesystem;

bool has_magic(const std::string& name) { return name.find_first_of("*?[") != std::string::npos; }
bool is_hidden(const fs::path& path) { return path.filename().native().starts_with('.'); }

/// The entries of a folder, in no order. A folder that cannot be read is an error, not an empty folder.
std::vector<fs::directory_entry> entries_of(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::directory_entry> entries;
  fs::directory_iterator it(folder.empty() ? fs::path(".") : folder, error), end;
  while (!error && it != end) {
    entries.push_back(*it);
    it.increment(error);
  }
  if (error) {
    fail(Fault::input, folder.string(),
         fmt::format("cannot read the folder: {}; check its permissions or leave it out", error.message()));
  }
  return entries;
}

bool is_real_folder(const fs::directory_entry& entry) {
  std::error_code error;
  return entry.is_directory(error) && !entry.is_symlink(error);
}

class Finder {
 public:
  std::vector<InputFile> files;

  void add_file(const fs::path& path) {
    std::error_code error;
    const std::uintmax_t bytes = fs::file_size(path, error);
    if (error) fail(Fault::input, path.string(), fmt::format("cannot read the file: {}", error.message()));
    files.push_back({path.lexically_normal().string(), static_cast<std::int64_t>(bytes)});
  }

  void add_folder(const fs::path& folder) {
    for (const auto& entry : entries_of(folder)) {
      if (is_hidden(entry.path())) continue;
      std::error_code error;
      if (is_real_folder(entry)) {
        add_folder(entry.path());
      } else if (entry.is_regular_file(error)) {
        add_file(entry.path());
      }
    }
  }

  /// Adds the files below `folder` that match parts[at..].
  void add_matches(const fs::path& folder, const std::vector<std::string>& parts, std::size_t at) {
    const std::string& part = parts[at];
    const bool last = at + 1 == parts.size();
    std::error_code error;
    if (!has_magic(part)) {
      const fs::path path = folder / part;
      if (last && fs::is_regular_file(path, error)) add_file(path);
      if (!last && fs::is_directory(path, error)) add_matches(path, parts, at + 1);
      return;
    }
    if (part == "**") {
      if (last) return add_folder(folder);
      add_matches(folder, parts, at + 1);
      for (const auto& entry : entries_of(folder)) {
        if (is_real_folder(entry) && !is_hidden(entry.path())) add_matches(folder / entry.path().filename(), parts, at);
      }
      return;
    }
    for (const auto& entry : entries_of(folder)) {
      const std::string name = entry.path().filename().string();
      if (::fnmatch(part.c_str(), name.c_str(), FNM_PERIOD) != 0) continue;
      if (last && entry.is_regular_file(error)) add_file(folder / name);
      if (!last && entry.is_directory(error)) add_matches(folder / name, parts, at + 1);
    }
  }
};

}  // namespace

std::vector<InputFile> find_inputs(const std::vector<std::string>& inputs) {
  if (inputs.empty()) fail(Fault::input, "inputs", "no inputs: name files, folders or patterns such as 'src/**/*.h'");
  Finder finder;
  for (const std::string& input : inputs) {
    const fs::path path(input);
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    const std::size_t before = finder.files.size();
    if (fs::is_regular_file(status)) {
      finder.add_file(path);
    } else if (fs::is_directory(status)) {
      finder.add_folder(path);
      if (finder.files.size() == before) fail(Fault::input, input, "no files in this folder or below (hidden ones aside)");
    } else if (fs::exists(status)) {
      fail(Fault::input, input, "neither a regular file nor a folder; save its contents to a file first");
    } else if (has_magic(input)) {
      std::vector<std::string> parts;
      for (const auto& part : path.relative_path()) {
        if (!part.empty() && part != "." && !(part == "**" && !parts.empty() && parts.back() == "**")) {
          parts.push_back(part.string());
        }
      }
      finder.add_matches(path.root_path(), parts, 0);
      if (finder.files.size() == before) fail(Fault::input, input, "no file matches this pattern");
    } else {
      fail(Fault::input, input, "no such file or folder");
    }
  }
  const auto by_path = [](const InputFile& a, const InputFile& b) { return a.path < b.path; };
  std::sort(finder.files.begin(), finder.files.end(), by_path);
  const auto same = [](const InputFile& a, const InputFile& b) { return a.path == b.path; };
  finder.files.erase(std::unique(finder.files.begin(), finder.files.end(), same), finder.files.end());
  return std::move(finder.files);
}

std::string noted_input(const std::string& input) {
  fs::path path = fs::absolute(input).lexically_normal();
  if (!path.has_filename() && path != path.root_path()) path = path.parent_path();  // "notes/"
  return path.string();
}

std::string folder_of(const std::string& prefix) { return fs::path(noted_input(prefix)).parent_path().string(); }

bool same_inputs(const std::vector<std::string>& a, const std::string& folder_a, const std::vector<std::string>& b,
                 const std::string& folder_b) {
  const auto is = [&](const std::string& x, const std::string& y) {
    const fs::path p(noted_input(x)), q(noted_input(y));
    return p == q || p.lexically_relative(folder_a) == q.lexically_relative(folder_b);
  };
  const auto has = [](const std::vector<std::string>& all, const auto& same) { return std::any_of(all.begin(), all.end(), same); };
  return std::all_of(a.begin(), a.end(), [&](const auto& x) { return has(b, [&](const auto& y) { return is(x, y); }); }) &&
         std::all_of(b.begin(), b.end(), [&](const auto& y) { return has(a, [&](const auto& x) { return is(x, y); }); });
}

}  // namespace capstan::data
