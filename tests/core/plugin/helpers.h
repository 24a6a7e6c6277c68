// defines: what the plugin tests share: folders of their own, patched libraries, messages of errors.
#pragma once
#include <capstan/error.h>
#include <capstan/plugin.h>

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::plugin_test {

namespace fs = std::filesystem;

/// A folder that goes with the test.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (fs::temp_directory_path() / "capstan_plugin_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path = fs::canonical(pattern);
  }
  ~TempFolder() { fs::remove_all(path); }
  fs::path path;
};

inline std::string read_bytes(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_bytes(const fs::path& path, const std::string& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

inline fs::path library(const std::string& name) { return fs::path(CAPSTAN_TEST_LIBRARIES) / (name + ".so"); }

/// A program's place in a folder of its own: <folder>/bin/capstan, with plugins in <folder>/lib/capstan/plugins.
struct Prefix {
  TempFolder folder;
  std::string program = (folder.path / "bin/capstan").string();
  fs::path plugins = folder.path / "lib/capstan/plugins";
  Prefix() {
    write_bytes(program, "");
    fs::create_directories(plugins);
  }
  /// A copy of a test library among the plugins.
  fs::path put(const std::string& library_name, const std::string& file_name = "") {
    const fs::path to = plugins / (file_name.empty() ? library_name + ".so" : file_name);
    fs::copy_file(library(library_name), to);
    return to;
  }
};

/// Where the PluginInfo lies in a library's bytes.
inline std::size_t info_offset(const std::string& bytes) {
  const std::string magic("CAPSTAN\0\xcc\0\0\0", 12);  // 204, its size
  const std::size_t at = bytes.find(magic);
  if (at == std::string::npos || bytes.find(magic, at + 1) != std::string::npos)
    throw std::runtime_error("no single PluginInfo");
  return at;
}

/// A library's bytes with its PluginInfo changed.
inline std::string with_info(const std::string& library_name, const std::function<void(PluginInfo&)>& change) {
  std::string bytes = read_bytes(library(library_name));
  const std::size_t at = info_offset(bytes);
  PluginInfo info;
  std::memcpy(&info, bytes.data() + at, sizeof info);
  change(info);
  std::memcpy(bytes.data() + at, &info, sizeof info);
  return bytes;
}

struct Caught {
  Fault fault = Fault::runtime;
  std::string text;
};

/// The Error that `f` throws; the test fails when it throws none.
template <class F>
Caught error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.fault(), e.what()};
  }
  ADD_FAILURE() << "expected an Error";
  return {};
}

}  // namespace capstan::plugin_test
