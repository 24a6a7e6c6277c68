// defines: PluginFile, plugin_kinds, inspect(), scan(), refusal(): what plugin libraries say of themselves, read from
// the files without running their code.
#pragma once
#include <capstan/export.h>
#include <capstan/plugin.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

inline constexpr std::array<std::string_view, 6> plugin_kinds = {"model",      "layer",     "optimizer",
                                                                 "checkpoint", "tokenizer", "inference"};

/// A library on disk and the PluginInfo inside it.
struct CAPSTAN_API PluginFile {
  std::string path;                            ///< absolute, symbolic links resolved
  std::uint64_t device = 0, inode = 0;         ///< which real file it is
  std::string kind, name, version, toolchain;  ///< "" when unreadable
  std::uint32_t core_epoch = 0, kind_epoch = 0;
  std::string info;     ///< the raw PluginInfo; "" when there is none
  std::string problem;  ///< why it is no plugin at all; "" when `info` was read and is well formed
  bool same_file(const PluginFile& other) const { return device == other.device && inode == other.inode; }
};

/// Reads the file's PluginInfo. Never throws on a bad file: what is wrong is in `problem`.
CAPSTAN_API PluginFile inspect(const std::string& path);

/// Every "*.so" directly in `folder`, by name; none when there is no such folder.
CAPSTAN_API std::vector<PluginFile> scan(const std::string& folder);

/// Why this program cannot run the plugin, in a few words; "" when it can. Compares magic, size, epochs and toolchain.
CAPSTAN_API std::string refusal(const PluginFile& file);

/// "core epoch 3, model epoch 1, libstdc++ cxx11abi=1 c++20 x8"; without the kind when that is unknown.
CAPSTAN_API std::string describe_build(std::uint32_t core, std::string_view kind, std::uint32_t of_kind,
                                       std::string_view toolchain);

}  // namespace capstan
