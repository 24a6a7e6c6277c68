// `capstan data build` as a person runs it: what it shows where, and how much memory it takes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

struct Built {
  int code = -1;
  std::string err;            ///< all that came to standard error
  std::int64_t resident = 0;  ///< bytes, at most
};

class DataBuild : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() / ("capstan_data_build_" + std::to_string(getpid()));
    fs::create_directories(folder);
  }
  void TearDown() override { fs::remove_all(folder); }

  /// Builds `text` with these words; standard error is `child_end`, which is read at `parent_end`.
  Built build(const std::string& text, const std::vector<std::string>& more, const char* term, int parent_end, int child_end) const {
    std::vector<std::string> words{CAPSTAN_PROGRAM, "data", "build", (folder / text).string(), "--out", (folder / "set").string(), "--force"};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::setenv("TERM", term, 1);
      ::dup2(child_end, STDERR_FILENO);
      ::dup2(::open("/dev/null", O_WRONLY), STDOUT_FILENO);
      ::close(child_end), ::close(parent_end);
      ::execv(argv[0], argv.data());
      ::_exit(126);
    }
    ::close(child_end);
    Built built;
    std::array<char, 4096> buffer;
    for (ssize_t n; (n = ::read(parent_end, buffer.data(), buffer.size())) > 0;) built.err.append(buffer.data(), static_cast<std::size_t>(n));
    ::close(parent_end);
    int status = 0;
    rusage usage{};
    ::wait4(pid, &status, 0, &usage);
    built.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    built.resident = std::int64_t{usage.ru_maxrss} * 1024;
    return built;
  }

  Built on_terminal(const char* term) const {
    const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    EXPECT_EQ(::grantpt(terminal), 0);
    EXPECT_EQ(::unlockpt(terminal), 0);
    std::array<char, 128> name{};
    EXPECT_EQ(::ptsname_r(terminal, name.data(), name.size()), 0);
    return build("text", {}, term, terminal, ::open(name.data(), O_RDWR | O_NOCTTY));
  }
  Built on_pipe(const std::string& text, const std::vector<std::string>& more = {}) const {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    return build(text, more, "xterm", ends[0], ends[1]);
  }

  fs::path folder;
};

TEST_F(DataBuild, TheBarIsForTerminalsThatCanRewriteALine) {
  std::ofstream(folder / "text") << std::string(5000, 'x');
  const Built shown = on_terminal("xterm");
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_THAT(shown.err, AllOf(HasSubstr("\r\033[K[========================] 100%"), HasSubstr("5 kB of 5 kB"), HasSubstr("1 documents")));
  EXPECT_TRUE(shown.err.ends_with("\r\033[K")) << "the bar is left on the screen: " << shown.err;
  for (const Built& plain : {on_terminal("dumb"), on_pipe("text")}) {
    EXPECT_EQ(plain.code, 0) << plain.err;
    EXPECT_EQ(plain.err, "");
  }
}

// Some 32 MiB of text and their tokens are in memory (190 to 220 MiB in all), be it one document or many. What reads a file whole
// takes those and 256 MiB more.
TEST_F(DataBuild, MemoryStaysBounded) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer keeps what was freed";
#endif
  constexpr std::int64_t bytes = std::int64_t{256} << 20, bound = std::int64_t{320} << 20;
  std::ofstream(folder / "one").close();
  fs::resize_file(folder / "one", bytes);  // zeros, which take no room on the disk
  const Built one = on_pipe("one", {"--threads", "2"});
  EXPECT_EQ(one.code, 0) << one.err;
  EXPECT_LT(one.resident, bound);
  fs::remove(folder / "one");
  {
    const std::string line(1023, 'x');
    std::ofstream many(folder / "many", std::ios::binary);
    for (std::int64_t n = 0; n < bytes / 1024; ++n) many << line << '\n';
  }
  const Built many = on_pipe("many", {"--threads", "2", "--format", "lines"});
  EXPECT_EQ(many.code, 0) << many.err;
  EXPECT_LT(many.resident, bound);
  std::printf("resident at most: %.0f MiB of one document, %.0f MiB of many\n", static_cast<double>(one.resident) / (1 << 20), static_cast<double>(many.resident) / (1 << 20));
}

}  // namespace
