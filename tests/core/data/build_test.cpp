// Building datasets: what is read, in which order, and what a failure leaves behind.
#include "data/build.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "data/inputs.h"
#include "helpers.h"

namespace capstan::data {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::int32_t> as_tokens(const std::string& text) {
  std::vector<std::int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  tokens.push_back(256);
  return tokens;
}

class Build : public ::testing::Test {
 protected:
  BuildOptions options(const std::string& input, const std::string& name = "out/set") {
    BuildOptions o;
    o.inputs = {input}, o.prefix = folder_ / name, o.tokenizer = std::make_shared<ByteTokens>();
    return o;
  }
  std::string outputs(const std::string& name) {
    return read_file(folder_ / (name + ".bin")) + read_file(folder_ / (name + ".idx")) +
           read_file(folder_ / (name + ".json"));
  }
  std::vector<std::string> names(const std::vector<std::string>& inputs) {
    std::vector<std::string> result;
    for (const auto& f : find_inputs(inputs)) result.push_back(f.path.substr(folder_.path().size() + 1));
    return result;
  }
  std::set<std::string> left() {
    std::set<std::string> found;
    if (!fs::exists(folder_ / "out")) return found;
    for (const auto& entry : fs::directory_iterator(folder_ / "out")) found.insert(entry.path().filename().string());
    return found;
  }
  TempFolder folder_;
};

TEST_F(Build, OneDocumentAFileInTheOrderOfPaths) {
  write_file(folder_ / "in/b.txt", "beta");
  write_file(folder_ / "in/a/z.txt", "zeta\n");
  write_file(folder_ / "in/c.txt", "");
  write_file(folder_ / "in/.hidden", "no");
  const auto result = build_dataset(options(folder_ / "in"));
  EXPECT_EQ(result.documents, 2);
  EXPECT_EQ(result.tokens, 11);
  EXPECT_EQ(result.empty, 1);
  EXPECT_EQ(result.files, 3);
  const IndexedDataset dataset(folder_ / "out/set");
  EXPECT_EQ(read_dataset(dataset), (Documents{as_tokens("zeta\n"), as_tokens("beta")}));
  const auto sidecar = Sidecar::read(dataset);
  ASSERT_TRUE(sidecar.has_value());
  EXPECT_EQ(sidecar->tokenizer, "test-bytes");
  EXPECT_EQ(sidecar->vocabulary, 257);
  EXPECT_EQ(sidecar->bin_digest, bin_digest(folder_ / "out/set"));
  EXPECT_EQ(left(), (std::set<std::string>{"set.bin", "set.idx", "set.json"}));
}

TEST_F(Build, Patterns) {
  for (const char* name : {"s/a.h", "s/b.cpp", "s/x/c.h", "s/x/y/d.h", "s/x/y/e.hpp", "s/.git/f.h", "t/g.h", "s/[odd].h"}) {
    write_file(folder_ / name, "text");
  }
  fs::create_directory_symlink(folder_ / "s", folder_ / "s/x/loop");
  EXPECT_THAT(names({folder_ / "s/*.h"}), ElementsAre("s/[odd].h", "s/a.h"));
  EXPECT_THAT(names({folder_ / "s/**/*.h"}), ElementsAre("s/[odd].h", "s/a.h", "s/x/c.h", "s/x/y/d.h"));
  EXPECT_THAT(names({folder_ / "**/y/*"}), ElementsAre("s/x/y/d.h", "s/x/y/e.hpp"));
  EXPECT_THAT(names({folder_ / "?/**"}),
              ElementsAre("s/[odd].h", "s/a.h", "s/b.cpp", "s/x/c.h", "s/x/y/d.h", "s/x/y/e.hpp", "t/g.h"));
  EXPECT_THAT(names({folder_ / "s/[ab].*"}), ElementsAre("s/a.h", "s/b.cpp"));
  EXPECT_THAT(names({folder_ / "s/[odd].h"}), ElementsAre("s/[odd].h"));  // a file of that very name wins
  EXPECT_THAT(names({folder_ / "s/.git/*"}), ElementsAre("s/.git/f.h"));
  EXPECT_THAT(names({folder_ / "t", folder_ / "s/../t/g.h", folder_ / "t/g*"}), ElementsAre("t/g.h"));
}

TEST_F(Build, InputsThatLeadNowhere) {
  fs::create_directories(folder_ / "empty");
  write_file(folder_ / "in/a.txt", "a");
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(error_of(Fault::input, [&] { find_inputs({}); }), HasSubstr("no inputs"));
  EXPECT_THAT(error_of(Fault::input, [&] { find_inputs({folder_ / "empty"}); }), HasSubstr("no files"));
  EXPECT_THAT(error_of(Fault::input,
                       [&] {
                         find_inputs({folder_ / "in", folder_ / "nothing"});
                       }),
              AllOf(HasSubstr("nothing"), HasSubstr("no such file")));
  EXPECT_THAT(error_of(Fault::input, [&] { find_inputs({folder_ / "in/*.cpp"}); }), HasSubstr("no file matches"));
  EXPECT_THAT(error_of(Fault::input, [&] { find_inputs({folder_ / "no/**/*.cpp"}); }), HasSubstr("no file matches"));
  EXPECT_THAT(error_of(Fault::input, [&] { find_inputs({folder_ / "pipe"}); }), HasSubstr("neither a regular file"));
  write_file(folder_ / "void/a.txt", "");
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(options(folder_ / "void")); }), HasSubstr("no text at all"));
  EXPECT_TRUE(left().empty());
}

// A file that vanishes between listing and reading stands for every read that fails: root may read what others may not.
TEST_F(Build, AFileThatCannotBeReadLeavesNothing) {
  for (int i = 0; i < 50; ++i) write_file(folder_ / ("in/" + std::to_string(100 + i)), std::string(5000, 'x'));
  BuildOptions o = options(folder_ / "in");
  o.progress = [&](const BuildProgress& p) {
    if (p.bytes == 0) fs::resize_file(folder_ / "in/149", 10);
  };
  o.threads = 1, o.window = 1;
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(o); }),
              AllOf(HasSubstr("in/149"), HasSubstr("shorter"), HasSubstr("expected 5000 bytes, got 10")));
  EXPECT_TRUE(left().empty());
}

TEST_F(Build, TheNumberOfThreadsChangesNothing) {
  std::mt19937 random(3);
  std::string everything;
  for (int i = 0; i < 200; ++i) {
    std::string text(i == 77 ? 5'300'000 : random() % 3000, ' ');  // one file of several pieces
    for (char& c : text) c = static_cast<char>(random());
    write_file(folder_ / ("in/" + std::to_string(1000 + i)), text);
    everything += text;
  }
  BuildOptions o = options(folder_ / "in");
  o.threads = 1;
  const auto result = build_dataset(o);
  EXPECT_EQ(result.bytes, static_cast<std::int64_t>(everything.size()));
  for (const int threads : {2, 7}) {
    for (const std::int64_t window : {std::int64_t{1}, std::int64_t{1} << 25}) {
      BuildOptions p = options(folder_ / "in", "out/again");
      p.threads = threads, p.window = window, p.force = true;
      build_dataset(p);
      EXPECT_EQ(outputs("out/again") == outputs("out/set"), true) << threads << " threads, window " << window;
    }
  }
  std::string back;
  for (const auto& document : read_dataset(IndexedDataset(folder_ / "out/set"))) {
    EXPECT_EQ(document.back(), 256);
    for (std::size_t i = 0; i + 1 < document.size(); ++i) back += static_cast<char>(document[i]);
  }
  EXPECT_EQ(back == everything, true);
}

TEST_F(Build, WordsAreNotCutAndBigDocumentsAreRefused) {
  std::string text;
  for (int i = 0; i < 400000; ++i) text += "seven77 ";
  write_file(folder_ / "in/a", text);
  BuildOptions o = options(folder_ / "in");
  o.tokenizer = std::make_shared<WordLengths>();
  EXPECT_EQ(build_dataset(o).type, TokenType::i32);
  EXPECT_EQ(read_dataset(IndexedDataset(folder_ / "out/set")), (Documents{std::vector<std::int32_t>(400000, 7)}));
  o.force = true, o.longest_document = 3000000;
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(o); }),
              AllOf(HasSubstr("3200000 bytes"), HasSubstr("--format lines")));
  EXPECT_EQ(IndexedDataset(folder_ / "out/set").tokens(), 400000);  // the old one is still whole
}

TEST_F(Build, LinesAndJson) {
  std::string lines, json;
  Documents expected;
  for (int i = 0; i < 60000; ++i) {  // more than one piece
    const std::string text = "line " + std::to_string(i) + (i % 3 ? " with some more words" : "");
    lines += text + (i % 2 ? "\r\n" : "\n") + (i % 10 == 0 ? "  \n\n" : "");
    json += R"({"id": )" + std::to_string(i) + R"(, "text": ")" + text + "\"}\n";
    expected.push_back(as_tokens(text));
  }
  lines += "the last one has no newline";
  json += R"({"text": "the last one has no newline"})";
  expected.push_back(as_tokens("the last one has no newline"));
  write_file(folder_ / "lines.txt", lines), write_file(folder_ / "rows.jsonl", json);
  BuildOptions o = options(folder_ / "lines.txt");
  o.format = Format::lines, o.threads = 3;
  build_dataset(o);
  EXPECT_EQ(read_dataset(IndexedDataset(folder_ / "out/set")) == expected, true);
  o = options(folder_ / "rows.jsonl", "out/json");
  o.format = Format::jsonl, o.threads = 3;
  build_dataset(o);
  EXPECT_EQ(read_dataset(IndexedDataset(folder_ / "out/json")) == expected, true);
}

TEST_F(Build, JsonErrorsNameTheLine) {
  const auto message = [&](const std::string& line) {
    std::string text;
    for (int i = 0; i < 30000; ++i)
      text += R"({"text": "a perfectly good line of text that goes on"})"
              "\n";
    write_file(folder_ / "rows.jsonl", text + "\n" + line + "\n");
    BuildOptions o = options(folder_ / "rows.jsonl");
    o.format = Format::jsonl;
    return error_of(Fault::input, [&] { build_dataset(o); });
  };
  EXPECT_THAT(message("{\"text\": "), HasSubstr("rows.jsonl:30002"));
  EXPECT_THAT(message("[1]"), HasSubstr("expected an object"));
  EXPECT_THAT(message("{\"text\": 5}"), HasSubstr("a string"));
  EXPECT_THAT(message("{\"text\": \"\xff\"}"), HasSubstr("rows.jsonl:30002"));
  EXPECT_THAT(message(std::string(100000, '[')), HasSubstr("rows.jsonl:30002"));
  EXPECT_TRUE(left().empty());
  BuildOptions o = options(folder_ / "rows.jsonl");
  o.format = Format::lines, o.longest_document = 1 << 21;
  write_file(folder_ / "rows.jsonl", "short\n" + std::string(6'000'000, 'x') + "\n");
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(o); }), AllOf(HasSubstr("longer than 2097152 bytes")));
}

TEST_F(Build, MaxBytesTakesARepresentativeSample) {
  // File i holds only the letter of its quarter: a sample must have some of each.
  for (int i = 0; i < 400; ++i) write_file(folder_ / ("in/" + std::to_string(1000 + i)), std::string(1000, "abcd"[i / 100]));
  BuildOptions o = options(folder_ / "in");
  o.max_bytes = 100'500;
  const auto result = build_dataset(o);
  EXPECT_EQ(result.bytes, 100'500);
  EXPECT_EQ(result.documents, 101);
  std::map<std::int32_t, int> letters;
  std::int32_t last = 0;
  for (const auto& document : read_dataset(IndexedDataset(folder_ / "out/set"))) {
    ++letters[document[0]];
    EXPECT_GE(document[0], last);  // still in the order of paths
    last = document[0];
  }
  for (const char c : std::string("abcd")) EXPECT_GT(letters[c], 10) << c;

  const auto sample = [&](std::uint64_t seed, int threads) {
    BuildOptions p = o;
    p.prefix = folder_ / "out/other", p.seed = seed, p.threads = threads, p.force = true;
    build_dataset(p);
    return outputs("out/other");
  };
  EXPECT_EQ(sample(0, 5) == outputs("out/set"), true);
  EXPECT_EQ(sample(1, 5) == outputs("out/set"), false);
}

TEST_F(Build, MaxBytesCutsBetweenCharactersAndSamplesLines) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "\xe2\x82\xac";  // the euro sign, 3 bytes
  write_file(folder_ / "in/a", text);
  BuildOptions o = options(folder_ / "in");
  o.max_bytes = 1000;
  EXPECT_EQ(build_dataset(o).bytes, 999);

  std::string lines;
  for (int i = 0; i < 20000; ++i) lines += "line number " + std::to_string(i) + "\n";
  write_file(folder_ / "lines/a", lines);
  o = options(folder_ / "lines", "out/lines");
  o.format = Format::lines, o.max_bytes = static_cast<std::int64_t>(lines.size()) / 10;
  const auto result = build_dataset(o);
  EXPECT_NEAR(static_cast<double>(result.documents), 2000, 200);
}

TEST_F(Build, AnExistingDatasetIsKeptUnlessForced) {
  write_file(folder_ / "in/a", "first");
  build_dataset(options(folder_ / "in"));
  const std::string before = outputs("out/set");
  write_file(folder_ / "in/a", "second");
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(options(folder_ / "in")); }), HasSubstr("--force"));
  EXPECT_EQ(outputs("out/set"), before);
  BuildOptions o = options(folder_ / "in");
  o.force = true;
  build_dataset(o);
  EXPECT_EQ(read_dataset(IndexedDataset(folder_ / "out/set")), (Documents{as_tokens("second")}));
  // A dataset inside its own input folder does not read itself.
  o = options(folder_ / "in", "in/set");
  build_dataset(o);
  const std::string once = outputs("in/set");
  o.force = true;
  build_dataset(o);
  EXPECT_EQ(outputs("in/set"), once);
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(options(folder_ / "in/a", "in/a/set")); }), HasSubstr("in/a"));
}

// Files may not grow past a limit: the same path through write(2) as a full disk, which a test cannot make.
TEST_F(Build, AWriteThatFailsLeavesNothing) {
  write_file(folder_ / "in/a", std::string(4'000'000, 'x'));
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1'000'000, 1'000'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      build_dataset(options(folder_ / "in"));
      ::_exit(1);
    } catch (const Error& e) {
      ::_exit(e.fault() == Fault::runtime && std::string(e.what()).find("set.bin.partial") != std::string::npos ? 42 : 2);
    }
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(WIFEXITED(status) ? WEXITSTATUS(status) : -1, 42);
  EXPECT_TRUE(left().empty());
}

TEST_F(Build, AKilledBuildLeavesNothingVisible) {
  for (int i = 0; i < 20; ++i) write_file(folder_ / ("in/" + std::to_string(i)), std::string(200'000, 'x'));
  int fds[2];
  ASSERT_EQ(::pipe(fds), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    BuildOptions o = options(folder_ / "in");
    o.progress = [&](const BuildProgress& p) {
      if (p.bytes < 2'000'000) return;
      [[maybe_unused]] const auto n = ::write(fds[1], "x", 1);
      ::pause();
    };
    build_dataset(o);
    ::_exit(1);
  }
  char byte = 0;
  ASSERT_EQ(::read(fds[0], &byte, 1), 1);
  ::kill(child, SIGKILL);
  int status = 0;
  ::waitpid(child, &status, 0);
  ::close(fds[0]), ::close(fds[1]);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(left(), (std::set<std::string>{"set.bin.partial", "set.idx.partial"}));
  EXPECT_EQ(build_dataset(options(folder_ / "in")).documents, 20);  // takes the leftovers over
  EXPECT_EQ(left(), (std::set<std::string>{"set.bin", "set.idx", "set.json"}));
}

// Between the renames the index waits under its temporary name while .bin, or .bin and .json, have theirs.
TEST_F(Build, AKillBetweenTheRenamesIsTakenOverWithoutForce) {
  write_file(folder_ / "in/a", "first");
  build_dataset(options(folder_ / "in"));
  const std::string whole = outputs("out/set");
  for (const bool json : {false, true}) {
    fs::rename(folder_ / "out/set.idx", folder_ / "out/set.idx.partial");
    if (!json) fs::rename(folder_ / "out/set.json", folder_ / "out/set.json.partial");
    EXPECT_THROW(IndexedDataset(folder_ / "out/set"), Error);
    build_dataset(options(folder_ / "in"));
    EXPECT_EQ(outputs("out/set"), whole);
    EXPECT_EQ(left(), (std::set<std::string>{"set.bin", "set.idx", "set.json"}));
  }
  // Files that no killed build left are kept, and a dataset is, whatever lies beside it.
  fs::remove(folder_ / "out/set.idx");
  for (const char* name : {"out/set.bin", "out/set.json"}) {
    EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(options(folder_ / "in")); }), HasSubstr(folder_ / name));
    fs::remove(folder_ / name);
  }
  build_dataset(options(folder_ / "in"));
  write_file(folder_ / "out/set.idx.partial", "");
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(options(folder_ / "in")); }), HasSubstr(folder_ / "out/set.idx]"));
  EXPECT_EQ(outputs("out/set"), whole);
}

TEST_F(Build, ARenameThatFailsLeavesNothingThatBlocks) {
  write_file(folder_ / "in/a", "first");
  build_dataset(options(folder_ / "in"));
  fs::remove(folder_ / "out/set.json");
  write_file(folder_ / "out/set.json/file", "");  // a folder: nothing can be renamed to it
  BuildOptions o = options(folder_ / "in");
  o.force = true;
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(o); }), HasSubstr("set.json] cannot rename"));
  EXPECT_EQ(left(), (std::set<std::string>{"set.json"}));
  fs::remove_all(folder_ / "out/set.json");
  EXPECT_EQ(build_dataset(options(folder_ / "in")).documents, 1);
  // An index that cannot go: the old dataset stays as it is.
  const std::string bin = read_file(folder_ / "out/set.bin");
  fs::remove(folder_ / "out/set.idx");
  write_file(folder_ / "out/set.idx/file", "");
  write_file(folder_ / "in/a", "second");
  EXPECT_THAT(error_of(Fault::input, [&] { build_dataset(o); }), HasSubstr("the old index cannot be removed"));
  EXPECT_EQ(read_file(folder_ / "out/set.bin"), bin);
}

// A child replaces a dataset by another again and again and is killed at any moment: what is there is one of the two,
// whole, or visibly nothing.
TEST_F(Build, KilledAtAnyMomentADatasetIsWholeOrAbsent) {
  write_file(folder_ / "a/1", std::string(30'000, 'a')), write_file(folder_ / "b/1", std::string(50'000, 'b'));
  std::mt19937 random(5);
  int whole = 0;
  for (int round = 0; round < 40; ++round) {
    int fds[2];
    ASSERT_EQ(::pipe(fds), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int i = 0;; ++i) {
        BuildOptions o = options(folder_ / (i % 2 ? "b" : "a"));
        o.force = true, o.threads = 1;
        build_dataset(o);
        if (i == 0 && ::write(fds[1], "x", 1) != 1) ::_exit(1);
      }
    }
    char byte = 0;
    ASSERT_EQ(::read(fds[0], &byte, 1), 1);  // one is there: what follows replaces it
    ::close(fds[0]), ::close(fds[1]);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 40000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    if (!fs::exists(folder_ / "out/set.idx")) continue;
    const IndexedDataset dataset(folder_ / "out/set");
    const auto sidecar = Sidecar::read(dataset);
    ASSERT_TRUE(sidecar.has_value());
    EXPECT_EQ(sidecar->bin_digest, bin_digest(folder_ / "out/set"));
    EXPECT_TRUE(dataset.tokens() == 30'001 || dataset.tokens() == 50'001) << dataset.tokens();
    ++whole;
  }
  EXPECT_GT(whole, 0);
}

}  // namespace
}  // namespace capstan::data
