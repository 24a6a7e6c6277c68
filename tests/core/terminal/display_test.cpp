// What a person sees: a live line on a terminal, plain lines elsewhere, the header, and text that cannot harm.
#include "core/train/support.h"
#include "terminal/display.h"

#include <gmock/gmock.h>

#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>

namespace capstan::terminal {
namespace {

using namespace train::testing;
using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

struct Seen { std::string text; int code = -1; };

/// The program in a terminal of its own.
Seen on_a_terminal(const std::vector<std::string>& words, const char* term, unsigned short columns) {
  winsize size{24, columns, 0, 0};
  std::vector<std::string> all{CAPSTAN_PROGRAM};
  all.insert(all.end(), words.begin(), words.end());
  std::vector<char*> argv;
  for (std::string& word : all) argv.push_back(word.data());
  argv.push_back(nullptr);
  int terminal = -1;
  const pid_t pid = ::forkpty(&terminal, nullptr, nullptr, &size);
  if (pid == 0) {
    ::setenv("TERM", term, 1);
    ::execv(argv[0], argv.data());
    ::_exit(126);
  }
  Seen seen;
  std::array<char, 4096> buffer;
  for (ssize_t n; (n = ::read(terminal, buffer.data(), buffer.size())) > 0;) seen.text.append(buffer.data(), static_cast<std::size_t>(n));
  int status = 0;
  ::waitpid(pid, &status, 0);
  ::close(terminal);
  if (WIFEXITED(status)) seen.code = WEXITSTATUS(status);
  return seen;
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

TEST(Terminal, ATerminalShowsOneLiveLine) {
  Project project;
  const Seen seen = on_a_terminal({"train", project.recipe()}, "xterm", 160);
  EXPECT_EQ(seen.code, 0) << seen.text;
  EXPECT_THAT(seen.text, AllOf(HasSubstr("\r\x1b[2Kstep 1/20  loss 5."), HasSubstr("\r\x1b[2Kstep 20/20"), HasSubstr("done: 20 steps")));
  EXPECT_EQ(count(seen.text, "\nstep 7/20"), 0u) << "a live line is rewritten, not added";
  EXPECT_GE(count(seen.text, "\r\x1b[2Kstep "), 20u);
}

TEST(Terminal, LiveLinesFitNarrowTerminals) {
  Project project;
  for (const unsigned short columns : {30, 40, 60, 80}) {
    const Seen seen = on_a_terminal({"train", project.recipe(), project.dir(std::to_string(columns))}, "xterm", columns);
    EXPECT_EQ(seen.code, 0) << seen.text;
    int lines = 0;
    for (std::size_t at = 0; (at = seen.text.find("\x1b[2Kstep ", at)) != std::string::npos; at += 4) {
      const std::size_t begin = at + 4, end = std::min(seen.text.find('\r', begin), seen.text.find('\n', begin));
      const std::string line = seen.text.substr(begin, end - begin);
      if (line.find(": ") != std::string::npos) continue;  // a note, which the terminal wraps
      ++lines;
      EXPECT_LT(line.size(), columns) << line;
      EXPECT_THAT(line, EndsWith(" left")) << "what does not fit is left out, the time left is not";
      if (columns != 60) {  // where it hangs on the rate's digits
        EXPECT_EQ(count(line, " tok/s"), columns > 60 ? 1u : 0u) << line;
      }
    }
    EXPECT_GE(lines, 20);
  }
}

TEST(Terminal, DumbTerminalsGetPlainLines) {
  Project project;
  const Seen seen = on_a_terminal({"train", project.recipe()}, "dumb", 160);
  EXPECT_EQ(seen.code, 0);
  EXPECT_THAT(seen.text, AllOf(Not(HasSubstr("\x1b")), HasSubstr("step 20/20")));
}

TEST(Terminal, WithoutATerminalLinesArePlain) {
  Project project;
  const Exit exit = train::testing::train(project.recipe(), {"train.sample_every=10", "train.sample_prompt=the cat"});
  ASSERT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.out, AllOf(Not(HasSubstr("\r")), Not(HasSubstr("\x1b")), HasSubstr("\nstep 1/20  loss 5."), HasSubstr("\nstep 20/20")));
  EXPECT_THAT(exit.out, AllOf(HasSubstr("step 10: the model writes\n  | the cat"), HasSubstr("step 5: validation loss")));
  // The data is built on the way and said so.
  EXPECT_THAT(exit.out, StartsWith("built " + (project / "data/text").string() + ": "));
  EXPECT_TRUE(fs::exists(project / "data/text.bin"));
}

TEST(Terminal, TheHeaderSaysWhatIsTrainedOnWhat) {
  Project project;
  const Exit exit = train::testing::train(project.recipe(), {"train.steps=1"});
  ASSERT_EQ(exit.code, 0) << exit.err;
  EXPECT_THAT(exit.out, HasSubstr("capstan train " + project.recipe()));
  for (const char* row : {"  model       GPT, 2 layers, 2 heads, width 32", "  parameters  ", "  data        ", "  training    1 steps of 4 x 32 tokens, 128 tokens in all",
                          "  optimizer   adamw, peak learning rate 0.003, cosine decay after 5 steps", "  machine     1 thread of ", "  memory      ", "  estimate    ", "  run         "})
    EXPECT_THAT(exit.out, HasSubstr(row));
}

// 200 steps do not make 200 lines in a log.
TEST(Terminal, PlainLinesAreAboutFifty) {
  Project project;
  const Exit exit = train::testing::train(project.recipe(), {"train.steps=200", "train.validate_every=0", "checkpoint.every_steps=0"});
  ASSERT_EQ(exit.code, 0) << exit.err;
  EXPECT_GE(count(exit.out, "\nstep "), 45u);
  EXPECT_LE(count(exit.out, "\nstep "), 60u);
  EXPECT_EQ(metrics(project / "run").size(), 200u);
}

TEST(Display, ControlCharactersOfTheModelAreNotObeyed) {
  ::testing::internal::CaptureStdout();
  {
    Display display;
    display.text("title", "a\x1b[31mb\tc\x07\nd\x7f" "caf\xc3\xa9");
  }
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), "title\n  | a.[31mb c.\n  | d.caf\xc3\xa9\n");
}

TEST(Display, Numbers) {
  EXPECT_EQ(short_count(7), "7");
  EXPECT_EQ(short_count(10'700), "10.7 k");
  EXPECT_EQ(short_count(124.44e6), "124.4 M");
  EXPECT_EQ(short_count(1.235e9), "1.24 B");
  EXPECT_EQ(short_count(15e12), "15.00 T");
  EXPECT_EQ(short_time(0.2), "0 s");
  EXPECT_EQ(short_time(42), "42 s");
  EXPECT_EQ(short_time(125), "2:05");
  EXPECT_EQ(short_time(3723), "1:02:03");
}

}  // namespace
}  // namespace capstan::terminal
