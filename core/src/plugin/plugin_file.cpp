// Reads plugins' descriptions and judges whether this program can load them.
#include "plugin/plugin_file.h"

#include "plugin/elf_section.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

namespace capstan {
namespace {

template <std::size_t N>
constexpr bool all_have_epochs(const std::array<std::string_view, N>& kinds) {
  for (auto kind : kinds)
    if (kind_epoch(kind) == 0) return false;
  return true;
}
static_assert(all_have_epochs(plugin_kinds), "a kind without an epoch: see kind_epoch() in plugin.h");

/// A field of PluginInfo as text; false when it is not terminated or holds what no name holds.
template <std::size_t N>
bool take(const char (&field)[N], std::string& out) {
  const auto* end = static_cast<const char*>(std::memchr(field, 0, N));
  if (end == nullptr || end == field) return false;
  out.assign(field, end);
  // Printable ASCII only: these texts go to terminals and messages.
  return std::all_of(out.begin(), out.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

void parse(const std::string& bytes, PluginFile& file) {
  PluginInfo info;
  if (bytes.size() < sizeof info) {
    file.problem = fmt::format("its description has {} bytes; one has {}", bytes.size(), sizeof info);
    return;
  }
  std::memcpy(&info, bytes.data(), sizeof info);
  if (std::memcmp(info.magic, "CAPSTAN", 8) != 0) {
    file.problem = "its description does not begin with CAPSTAN";
    return;
  }
  if (info.size != sizeof info) {
    file.problem = fmt::format("its description says that it has {} bytes; one has {}", info.size, sizeof info);
    return;
  }
  PluginFile parsed = file;
  if (!take(info.kind, parsed.kind) || !take(info.name, parsed.name) || !take(info.version, parsed.version) ||
      !take(info.toolchain, parsed.toolchain)) {
    file.problem = "its description holds a text that is empty, unterminated or not printable";
    return;
  }
  if (parsed.name.find_first_of("/ ") != std::string::npos) {
    file.problem = fmt::format("its name '{}' holds a slash or a space", parsed.name);
    return;
  }
  parsed.core_epoch = info.core_epoch;
  parsed.kind_epoch = info.kind_epoch;
  parsed.info = bytes.substr(0, sizeof info);
  file = std::move(parsed);
}

}  // namespace

PluginFile inspect(const std::string& path) {
  PluginFile file;
  std::error_code ignored;
  const std::filesystem::path real = std::filesystem::canonical(path, ignored);
  file.path = ignored ? path : real.string();
  struct stat status {};
  if (::stat(file.path.c_str(), &status) != 0) {
    file.problem = fmt::format("cannot open the file: {}", std::strerror(errno));
    return file;
  }
  file.device = status.st_dev;
  file.inode = status.st_ino;
  try {
    const auto bytes = read_elf_section(file.path, ".capstan_plugin");
    if (bytes)
      parse(*bytes, file);
    else
      file.problem = "a shared library, but no Capstan plugin: it has no section .capstan_plugin";
  } catch (const Error& e) {
    file.problem = e.what();
  }
  return file;
}

std::vector<PluginFile> scan(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  for (std::filesystem::directory_iterator i(folder, error), end; !error && i != end; i.increment(error)) {
    std::error_code ignored;
    if (i->path().extension() == ".so" && !i->is_directory(ignored)) paths.push_back(i->path().string());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<PluginFile> files;
  for (const auto& path : paths) files.push_back(inspect(path));
  return files;
}

std::string refusal(const PluginFile& file) {
  if (!file.problem.empty()) return file.problem;
  if (kind_epoch(file.kind) == 0) return fmt::format("this program knows no plugin kind '{}'", file.kind);
  if (file.core_epoch != core_epoch) return fmt::format("core epoch {}, here {}", file.core_epoch, core_epoch);
  if (file.kind_epoch != kind_epoch(file.kind)) {
    return fmt::format("{} epoch {}, here {}", file.kind, file.kind_epoch, kind_epoch(file.kind));
  }
  if (file.toolchain != CAPSTAN_TOOLCHAIN)
    return fmt::format("toolchain '{}', here '{}'", file.toolchain, CAPSTAN_TOOLCHAIN);
  return "";
}

std::string describe_build(std::uint32_t core, std::string_view kind, std::uint32_t of_kind, std::string_view toolchain) {
  if (of_kind == 0) return fmt::format("core epoch {}, {}", core, toolchain);
  return fmt::format("core epoch {}, {} epoch {}, {}", core, kind, of_kind, toolchain);
}

}  // namespace capstan
