// `capstan data` as a person uses it, and the byte tokenizer that it loads.
#include <capstan/tokenizer.h>
#include <gmock/gmock.h>
#include <sys/wait.h>

#include <cstdio>

#include "helpers.h"
#include "plugin/host.h"

namespace capstan::data {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int code = -1;
  std::string output;  // both streams
};

Ran capstan(const std::string& words) {
  Ran ran;
  FILE* pipe = ::popen((std::string(CAPSTAN_PROGRAM) + " " + words + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return ran;
  char buffer[4096];
  for (std::size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) ran.output.append(buffer, n);
  const int status = ::pclose(pipe);
  ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return ran;
}

TEST(DataCommand, BuildsAndShows) {
  const TempFolder folder;
  write_file(folder / "in/a.txt", "Hello, world.\n\x1b[31mred");
  write_file(folder / "in/b.txt", "Second.");
  const std::string prefix = folder / "set";
  Ran ran = capstan("data build --out " + prefix + " '" + (folder / "in/*.txt") + "'");
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, AllOf(HasSubstr("2 documents, 31 tokens"), HasSubstr("vocabulary 257"), Not(HasSubstr("\r"))));
  ran = capstan("data info " + prefix + " --show 100 --verify");
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, AllOf(HasSubstr("documents  2"), HasSubstr("type       u16"), HasSubstr("tokenizer  byte"),
                                HasSubstr("verified"), HasSubstr("Hello, world.\n\\x1b[31mredSecond.")));
  EXPECT_THAT(ran.output, Not(HasSubstr("\x1b")));
  ran = capstan("data build --out " + prefix + " " + (folder / "in"));
  EXPECT_EQ(ran.code, 2);
  EXPECT_THAT(ran.output, HasSubstr("--force"));
  ran = capstan("data build --force --format lines --tokenizer-option end_of_document=false --out " + prefix + " " +
                (folder / "in"));
  EXPECT_EQ(ran.code, 0) << ran.output;
  EXPECT_THAT(ran.output, AllOf(HasSubstr("3 documents, 28 tokens"), HasSubstr("vocabulary 256")));
}

TEST(DataCommand, MistakesAreExitCode2) {
  const TempFolder folder;
  write_file(folder / "a.txt", "text");
  const std::string out = " --out " + (folder / "set") + " ", input = folder / "a.txt";
  const auto refused = [](const std::string& words) {
    const Ran ran = capstan(words);
    EXPECT_EQ(ran.code, 2) << words << "\n" << ran.output;
    return ran.output;
  };
  EXPECT_THAT(refused("data build" + out + (folder / "nothing")), HasSubstr("no such file"));
  EXPECT_THAT(refused("data build " + input), HasSubstr("--out"));
  EXPECT_THAT(refused("data build" + out), HasSubstr("input"));
  EXPECT_THAT(refused("data build --format pages" + out + input), HasSubstr("pages"));
  EXPECT_THAT(refused("data build --tokenizer bite" + out + input), HasSubstr("bite"));
  EXPECT_THAT(refused("data build --tokenizer-option color=red" + out + input), HasSubstr("color"));
  EXPECT_THAT(refused("data build --tokenizer-option color" + out + input), HasSubstr("NAME=VALUE"));
  EXPECT_THAT(refused("data build --threads -1" + out + input), HasSubstr("--threads"));
  EXPECT_THAT(refused("data build --seed -1" + out + input), HasSubstr("--seed: expected an integer from 0"));
  EXPECT_THAT(refused("data build --max-bytes many" + out + input), HasSubstr("--max-bytes"));
  EXPECT_THAT(refused("data info " + (folder / "nothing")), HasSubstr("nothing.idx"));
  EXPECT_FALSE(std::filesystem::exists(folder / "set.idx"));

  // A dataset of another maker: no note of the tokenizer.
  write_dataset(folder / "foreign", {{72, 105}, {300}});
  EXPECT_THAT(refused("data info --show 5 " + (folder / "foreign")), HasSubstr("--tokenizer NAME"));
  EXPECT_THAT(refused("data info --show 5 --tokenizer byte " + (folder / "foreign")), HasSubstr("got 300"));
  EXPECT_THAT(refused("data info --verify " + (folder / "foreign")), HasSubstr("digest"));
  EXPECT_THAT(capstan("data info --show 2 --tokenizer byte " + (folder / "foreign")).output, HasSubstr("Hi"));

  capstan("data build" + out + input);
  std::string bin = read_file(folder / "set.bin");
  bin[2] ^= 1;
  write_file(folder / "set.bin", bin);
  EXPECT_THAT(refused("data info --verify " + (folder / "set")), HasSubstr("expected xxh3"));
}

TEST(ByteTokenizer, AnyBytesComeBack) {
  PluginHost host(CAPSTAN_PROGRAM);
  const auto byte = host.make_as<Tokenizer>(host.choice("tokenizer", "byte", {}));
  EXPECT_EQ(byte->name(), "byte");
  EXPECT_EQ(byte->vocabulary(), 257);
  EXPECT_EQ(byte->end_of_document(), 256);
  EXPECT_TRUE(byte->splits_anywhere());
  std::string all;
  for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
  std::vector<std::int32_t> tokens{7};
  byte->encode(all, tokens);  // appends
  ASSERT_EQ(tokens.size(), 257u);
  EXPECT_EQ(tokens[0], 7);
  EXPECT_EQ(tokens[256], 255);
  EXPECT_EQ(byte->decode(tokens), "\x07" + all);
  EXPECT_EQ(byte->decode(std::vector<std::int32_t>{72, 256, 105}), "Hi");
  for (const std::int32_t bad : {-1, 257}) {
    EXPECT_THAT(error_of(Fault::input,
                         [&] {
                           byte->decode(std::vector<std::int32_t>{1, bad});
                         }),
                AllOf(HasSubstr("token 1"), HasSubstr("got " + std::to_string(bad))));
  }
  const std::pair<std::string, std::string> off[] = {{"end_of_document", "false"}};
  const auto plain = host.make_as<Tokenizer>(host.choice("tokenizer", "byte", off));
  EXPECT_EQ(plain->vocabulary(), 256);
  EXPECT_EQ(plain->end_of_document(), -1);
  error_of(Fault::input, [&] { plain->decode(std::vector<std::int32_t>{256}); });
}

}  // namespace
}  // namespace capstan::data
