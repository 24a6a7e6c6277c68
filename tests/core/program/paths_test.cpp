// Paths that cannot be looked at, listed or made are bad input with words, whatever command meets them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <string>

namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class Paths : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() / ("capstan_paths_" + std::to_string(getpid()));
    fs::create_directories(folder);
    fs::create_symlink("loop", folder / "loop");  // which nobody can follow, root neither
  }
  void TearDown() override { fs::remove_all(folder); }
  /// `words` are refused with exit code 2 and with each of `expected`, and no library's words are shown.
  void refused(const std::string& words, const std::string& expected, const std::string& before = "") const {
    SCOPED_TRACE(words);
    FILE* pipe = popen(("cd '" + folder.string() + "' && " + before + " '" + CAPSTAN_PROGRAM + "' " + words + " 2>&1").c_str(), "r");
    std::string text;
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) text.append(buffer.data(), n);
    const int status = pclose(pipe);
    EXPECT_EQ(WIFEXITED(status) ? WEXITSTATUS(status) : 128, 2) << text;
    EXPECT_THAT(text, AllOf(HasSubstr(expected), Not(HasSubstr("filesystem error"))));
  }
  fs::path folder;
};

TEST_F(Paths, ALinkInACircle) {
  const std::string words = "cannot be looked at: Too many levels of symbolic links; mend the symbolic link";
  refused("generate loop", "[loop/recipe.yaml] " + words);
  refused("checkpoint info loop", "/loop] " + words);
  refused("checkpoint verify loop/run", "/loop/run] " + words);
  refused("plugin new abc --kind model --dir loop/abc", "loop/abc] " + words);
}

TEST_F(Paths, ANameThatIsTooLong) {
  refused("generate " + std::string(300, 'x'), "File name too long; name another path");
  refused("checkpoint info " + std::string(300, 'x'), "File name too long");
}

TEST_F(Paths, WhereNoFolderCanBeMade) {
  refused("plugin new abc --kind model --dir /dev/null/x", "cannot make the folder /dev/null/x: Not a directory; name another path; --dir says where");
}

TEST_F(Paths, AnEmptyOne) { refused("checkpoint info ''", "got an empty path"); }

// Nothing looks for this one: the last net holds it.
TEST_F(Paths, AWorkingFolderThatIsGone) {
  refused("plugin list --plugin-path x", "[x] cannot be used: No such file or directory; name another path", "mkdir gone && cd gone && rmdir ../gone &&");
}

}  // namespace
