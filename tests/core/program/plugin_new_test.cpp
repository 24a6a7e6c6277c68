// `capstan plugin new` writes all of a plugin's start or nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

class PluginNew : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() / ("capstan_plugin_new_" + std::to_string(getpid()));
    fs::create_directories(folder);
  }
  void TearDown() override { fs::remove_all(folder); }
  /// The exit code of `command` in the test's folder; `text` is all that it said.
  int run(const std::string& command) {
    FILE* pipe = popen(("cd '" + folder.string() + "' && { " + command + "; } 2>&1").c_str(), "r");
    std::array<char, 4096> buffer;
    text.clear();
    for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) text.append(buffer.data(), n);
    const int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
  }
  static std::string program() { return std::string("'") + CAPSTAN_PROGRAM + "'"; }
  fs::path folder;
  std::string text;
};

TEST_F(PluginNew, WritesWhatItSays) {
  EXPECT_EQ(run(program() + " plugin new abc --kind optimizer --dir deep/er/abc"), 0) << text;
  for (const char* file : {"CMakeLists.txt", "README.md", "abc.cpp", "recipe.yaml"}) {
    EXPECT_TRUE(fs::is_regular_file(folder / "deep/er/abc" / file)) << file;
    EXPECT_THAT(text, HasSubstr(std::string("deep/er/abc/") + file));
  }
}

// Files of more than 512 bytes cannot be written here: the source is one, the build file is none.
TEST_F(PluginNew, AFailedWriteLeavesNothing) {
  const std::string small = "trap '' XFSZ; ulimit -f 1; ";
  EXPECT_EQ(run(small + program() + " plugin new abc --kind optimizer --dir deep/er/abc"), 1);
  EXPECT_THAT(text, AllOf(HasSubstr("cannot write deep/er/abc/"), HasSubstr("File too large"), HasSubstr("nothing was left behind")));
  EXPECT_TRUE(fs::is_empty(folder));
  // A folder that was there stays, without the files.
  fs::create_directories(folder / "mine");
  EXPECT_EQ(run(small + program() + " plugin new abc --kind optimizer --dir mine"), 1);
  EXPECT_TRUE(fs::exists(folder / "mine"));
  EXPECT_TRUE(fs::is_empty(folder / "mine"));
}

// The program finds its templates beside itself: a copy of it has a copy of them, to which a file is added.
TEST_F(PluginNew, TwoTemplatesOfOneFileAreRefused) {
  const fs::path there = fs::canonical(CAPSTAN_PROGRAM).parent_path().parent_path();
  fs::create_directories(folder / "copy/bin"), fs::create_directories(folder / "copy/share/capstan");
  fs::copy_file(fs::canonical(CAPSTAN_PROGRAM), folder / "copy/bin/capstan");
  fs::copy(there / "share/capstan/templates", folder / "copy/share/capstan/templates", fs::copy_options::recursive);
  const std::string words = "LD_LIBRARY_PATH='" + (there / "lib").string() + "' copy/bin/capstan plugin new abc --kind optimizer --dir abc";
  std::ofstream(folder / "copy/share/capstan/templates/plugin/abc.cpp") << "shared";
  EXPECT_EQ(run(words), 1);
  EXPECT_THAT(text, AllOf(HasSubstr("two templates in"), HasSubstr("make the file abc.cpp"), HasSubstr("nothing was written")));
  EXPECT_FALSE(fs::exists(folder / "abc"));
  fs::remove(folder / "copy/share/capstan/templates/plugin/abc.cpp");
  EXPECT_EQ(run(words), 0) << text;
}

}  // namespace
