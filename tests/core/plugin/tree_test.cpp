// The rules of the tree that no compiler checks: who may include whom, and what a plugin may export.
#include "core/plugin/helpers.h"

#include <gmock/gmock.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>

namespace capstan::plugin_test {
namespace {

struct Include {
  std::string file, target;
  bool quoted = false;
};

/// Every #include of a C++ or CUDA source under `folder`.
std::vector<Include> includes_of(const fs::path& folder) {
  std::vector<Include> all;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string ending = entry.path().extension().string();
    if (ending != ".h" && ending != ".cpp" && ending != ".cu" && ending != ".cuh") continue;
    std::ifstream in(entry.path());
    for (std::string line; std::getline(in, line);) {
      const auto hash = line.find_first_not_of(" \t");
      if (hash == std::string::npos || line[hash] != '#') continue;
      const auto word = line.find("include", hash);
      const auto open = line.find_first_of("<\"", hash);
      if (word == std::string::npos || open == std::string::npos || line.find_first_not_of(" \t", hash + 1) != word)
        continue;
      const auto close = line.find_first_of(">\"", open + 1);
      all.push_back({entry.path().string(), line.substr(open + 1, close - open - 1), line[open] == '"'});
    }
  }
  return all;
}

const fs::path root = CAPSTAN_SOURCE_DIR;

bool starts(const std::string& text, std::string_view with) { return text.rfind(with, 0) == 0; }

/// Whether a quoted include names a file beside the one that says it, or below `folder`.
bool lies_in(const Include& i, const fs::path& folder) {
  const fs::path beside = (fs::path(i.file).parent_path() / i.target).lexically_normal();
  return fs::exists(beside) && starts(beside.string(), folder.string());
}

std::set<std::string> core_areas() {
  std::set<std::string> areas;
  for (const auto& entry : fs::directory_iterator(root / "core/src")) areas.insert(entry.path().filename().string());
  return areas;
}

TEST(Tree, KernelsKnowNothingOfCore) {
  const auto all = includes_of(root / "kernels");
  ASSERT_FALSE(all.empty());
  for (const auto& i : all) {
    EXPECT_FALSE(starts(i.target, "capstan/") && !starts(i.target, "capstan/kernels/"))
        << i.file << " includes " << i.target;
    EXPECT_FALSE(starts(i.target, "core/") || starts(i.target, "plugins/")) << i.file << " includes " << i.target;
    EXPECT_EQ(core_areas().count(fs::path(i.target).begin()->string()) == 1 && i.quoted && !lies_in(i, root / "kernels"),
              false)
        << i.file << " includes " << i.target;
  }
}

TEST(Tree, CoreKnowsNoPlugin) {
  const auto all = includes_of(root / "core");
  ASSERT_FALSE(all.empty());
  for (const auto& i : all) {
    EXPECT_EQ(i.target.find("plugins/"), std::string::npos) << i.file << " includes " << i.target;
    EXPECT_EQ(i.target.find("tests/"), std::string::npos) << i.file << " includes " << i.target;
  }
}

TEST(Tree, TheMapOfTheHouseHasEveryFolderOfCore) {
  std::ifstream in(root / "docs/maintainers/house.md");
  const std::string map((std::istreambuf_iterator<char>(in)), {});
  for (const auto& area : core_areas()) EXPECT_NE(map.find("`" + area + "`"), std::string::npos) << area << " is not in docs/maintainers/house.md";
}

TEST(Tree, PublicHeadersIncludeOnlyPublicOnes) {
  for (const auto& folder : {root / "core/include", root / "kernels/include"}) {
    for (const auto& i : includes_of(folder)) {
      EXPECT_FALSE(i.quoted) << i.file << " includes \"" << i.target << "\"";
      const bool standard = i.target.find('/') == std::string::npos && i.target.find('.') == std::string::npos;
      const bool own = starts(i.target, "capstan/") &&
                       (fs::exists(root / "core/include" / i.target) || fs::exists(root / "kernels/include" / i.target));
      EXPECT_TRUE(standard || own || i.target == "immintrin.h") << i.file << " includes " << i.target;
    }
  }
}

TEST(Tree, PluginsUseWhatThirdPartiesHave) {
  const auto all = includes_of(root / "plugins");
  ASSERT_FALSE(all.empty());
  for (const auto& i : all) {
    // Quoted: a file of the plugin itself.
    if (i.quoted) {
      EXPECT_TRUE(lies_in(i, fs::path(i.file).parent_path())) << i.file << " includes \"" << i.target << "\"";
    }
    EXPECT_FALSE(starts(i.target, "capstan/") && !fs::exists(root / "core/include" / i.target) &&
                 !fs::exists(root / "kernels/include" / i.target))
        << i.file << " includes " << i.target;
    EXPECT_FALSE(starts(i.target, "core/") || starts(i.target, "kernels/")) << i.file << " includes " << i.target;
  }
}

std::string output_of(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  if (!pipe) throw std::runtime_error("cannot run " + command);
  std::string text;
  std::array<char, 4096> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe.get())) text.append(buffer.data(), n);
  return text;
}

TEST(Tree, PluginsExportTwoSymbols) {
  int libraries = 0;
  for (const auto& entry : fs::directory_iterator(CAPSTAN_PLUGIN_DIR)) {
    if (entry.path().extension() != ".so") continue;
    ++libraries;
    std::istringstream lines(output_of("nm -D --defined-only '" + entry.path().string() + "'"));
    std::set<std::string> names;
    for (std::string address, type, name; lines >> address >> type >> name;) names.insert(name);
    EXPECT_THAT(names, testing::ElementsAre("capstan_plugin_info", "capstan_plugin_register")) << entry.path();
    EXPECT_THAT(output_of("readelf -d '" + entry.path().string() + "'"), testing::HasSubstr("NODELETE")) << entry.path();
  }
  EXPECT_GT(libraries, 0);
}

}  // namespace
}  // namespace capstan::plugin_test
