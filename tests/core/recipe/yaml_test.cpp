// What the YAML reader takes, what it refuses and with which words; that no bytes whatever crash it.
#include "recipe/yaml.h"

#include "recipe_fixture.h"

#include <random>

namespace capstan {
namespace {

using ::testing::AllOf;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

const Origin file{Origin::Kind::file, "r.yaml", 0};

std::string refusal(const std::string& text, const YamlLimits& limits = {}) {
  return error_of(Fault::input, [&] { parse_yaml(text, file, limits); });
}

TEST(Yaml, KeepsOrderLinesAndQuotes) {
  const YamlNode root = parse_yaml("b: 1\na:\n  - x\n  - 'y'\nc: {d: \"2\", e: }\nf: |\n  two\n  lines\n", file);
  ASSERT_EQ(root.entries.size(), 4U);
  EXPECT_EQ(root.entries[0].name, "b");
  EXPECT_EQ(root.entries[1].name, "a");
  EXPECT_EQ(root.entries[1].origin.text(), "r.yaml:2");
  const YamlNode& list = root.find("a")->value;
  ASSERT_EQ(list.kind, YamlNode::Kind::list);
  EXPECT_EQ(list.items[0].text, "x");
  EXPECT_FALSE(list.items[0].quoted);
  EXPECT_TRUE(list.items[1].quoted);
  EXPECT_EQ(list.items[1].origin.line, 4);
  const YamlNode& map = root.find("c")->value;
  EXPECT_TRUE(map.find("d")->value.quoted);
  EXPECT_EQ(map.find("e")->value.kind, YamlNode::Kind::null);
  EXPECT_EQ(root.find("f")->value.text, "two\nlines\n");
  EXPECT_TRUE(root.find("f")->value.quoted);
}

TEST(Yaml, TakesWindowsLinesByteOrderMarkAndDocumentMarkers) {
  EXPECT_EQ(parse_yaml("a: 1\r\nb: 2\r\n", file).find("b")->value.text, "2");
  EXPECT_EQ(parse_yaml("\xEF\xBB\xBF"
                       "a: 1\n",
                       file)
                .find("a")
                ->value.text,
            "1");
  EXPECT_EQ(parse_yaml("--- # one\na: 1\n...\n", file).find("a")->origin.line, 2);
  EXPECT_EQ(parse_yaml("a: \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\n", file).find("a")->value.text,
            "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
}

TEST(Yaml, ExpandsAliases) {
  const YamlNode root = parse_yaml("a: &x {k: [1, 2]}\nb: *x\n", file);
  EXPECT_EQ(root.find("b")->value.find("k")->value.items[1].text, "2");
}

TEST(Yaml, RefusesDuplicateKeys) {
  EXPECT_THAT(refusal("a: 1\nb: 2\n\na: 3\n"), AllOf(StartsWith("[r.yaml:4]"), HasSubstr("'a' twice"), HasSubstr("line 1")));
  EXPECT_THAT(refusal("m:\n  k: 1\n  \"k\": 2\n"), AllOf(StartsWith("[r.yaml:3]"), HasSubstr("'k' twice")));
}

TEST(Yaml, RefusesWhatIsNoMap) {
  EXPECT_THAT(refusal(""), HasSubstr("there is nothing in it"));
  EXPECT_THAT(refusal("# only a comment\n"), HasSubstr("there is nothing in it"));
  EXPECT_THAT(refusal("---\n"), HasSubstr("there is nothing in it"));
  EXPECT_THAT(refusal("- a\n- b\n"), AllOf(StartsWith("[r.yaml:1]"), HasSubstr("a list"), HasSubstr("expected a map")));
  EXPECT_THAT(refusal("\nhello\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("'hello'")));
}

TEST(Yaml, RefusesSecondDocumentsAndStrayCharacters) {
  EXPECT_THAT(refusal("a: 1\n---\nb: 2\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("second YAML document")));
  // The library never moves past these: without the limit on documents this test would not end.
  EXPECT_THAT(refusal(", a: 1\n"), HasSubstr("cannot be read as YAML from here"));
  EXPECT_THAT(refusal("a: 1\n]\n"), Not(HasSubstr("second")));
}

TEST(Yaml, RefusesBytesThatAreNoText) {
  EXPECT_THAT(refusal("a: 1\nb: \xFF\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("0xff is not UTF-8")));
  EXPECT_THAT(refusal("a: \xC0\xAF\n"), HasSubstr("not UTF-8"));          // overlong
  EXPECT_THAT(refusal("a: \xED\xA0\x80\n"), HasSubstr("not UTF-8"));      // a surrogate
  EXPECT_THAT(refusal("a: \xF4\x90\x80\x80\n"), HasSubstr("not UTF-8"));  // past U+10FFFF
  EXPECT_THAT(refusal("a: \xE2\x82"), HasSubstr("not UTF-8"));            // cut off
  EXPECT_THAT(refusal("\xFF\xFE"
                      "a\0:\0"),
              HasSubstr("not UTF-8"));  // UTF-16
  EXPECT_THAT(refusal(std::string("a: 1\n\n\0b: 2\n", 13)), AllOf(StartsWith("[r.yaml:3]"), HasSubstr("NUL")));
  EXPECT_THAT(refusal("a: \"x\\0y\"\n"), HasSubstr("NUL"));
  EXPECT_THAT(refusal("a: \x1B[31m\n"), HasSubstr("control character 0x1b"));
}

TEST(Yaml, RefusesTabsInIndentation) {
  EXPECT_THAT(refusal("a:\n\tb: 1\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("tab")));
  EXPECT_THAT(refusal("a:\n  \tb: 1\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("tab")));
  EXPECT_EQ(parse_yaml("a: x\ty # t\tt\n", file).find("a")->value.text, "x\ty");
}

TEST(Yaml, RefusesTagsMergeKeysAndKeysThatAreNoNames) {
  EXPECT_THAT(refusal("a: !!python/object:os.system x\n"), AllOf(StartsWith("[r.yaml:1]"), HasSubstr("tag")));
  EXPECT_THAT(refusal("a: &x {b: 1}\nc:\n  <<: *x\n"), AllOf(StartsWith("[r.yaml:3]"), HasSubstr("extends")));
  EXPECT_THAT(refusal("? [a, b]\n: 1\n"), HasSubstr("a key must be a name, not a list"));
  EXPECT_THAT(refusal("~: 1\n"), HasSubstr("a key must be a name"));
}

TEST(Yaml, RefusesBrokenSyntaxWithItsLine) {
  EXPECT_THAT(refusal("a: 1\nb: [1, 2\nc: 3\n"), AllOf(StartsWith("[r.yaml:"), HasSubstr("not YAML")));
  EXPECT_THAT(refusal("a: 1\nb: *nobody\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("anchor is not defined")));
  for (const char* open : {"a: 1\nb: 'open", "a: 1\nb: 'open\n", "a: 1\nb: \"open\n", "a: 1\nb: {c: \"open", "'", "\"a\\"}) {
    EXPECT_THAT(refusal(open), AllOf(HasSubstr("not YAML"), HasSubstr("quote"))) << open;
  }
  EXPECT_THAT(refusal("a:\n    b: 1\n  c: 2\n"), AllOf(StartsWith("[r.yaml:3]"), HasSubstr("not YAML")));
}

TEST(Yaml, RefusesAliasBombs) {
  std::string nodes = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string one = "*a" + std::to_string(i - 1);
    nodes += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + one;
    for (int k = 0; k < 9; ++k) nodes += ", " + one;
    nodes += "]\n";
  }
  EXPECT_THAT(refusal(nodes), AllOf(StartsWith("[r.yaml:"), HasSubstr("more than 100000 values")));

  std::string bytes = "a: &a \"" + std::string(100'000, 'x') + "\"\nb: [*a";
  for (int i = 0; i < 1000; ++i) bytes += ", *a";
  EXPECT_THAT(refusal(bytes + "]\n"), AllOf(StartsWith("[r.yaml:2]"), HasSubstr("bytes of text")));

  EXPECT_THAT(refusal("a: &a [*a]\n"), HasSubstr("no end"));
}

TEST(Yaml, RefusesDepthAndSize) {
  EXPECT_THAT(refusal("a: " + std::string(100'000, '[')), HasSubstr("64 levels"));
  std::string dashes = "a:\n  ";
  for (int i = 0; i < 5000; ++i) dashes += "- ";
  EXPECT_THAT(refusal(dashes + "x\n"), HasSubstr("64 levels"));
  EXPECT_THAT(refusal("a: " + std::string(std::size_t{1} << 20, 'x')), HasSubstr("1048576"));
  EXPECT_NO_THROW(parse_yaml("a: " + std::string(1000, 'x'), file));
}

TEST(Yaml, ValuesOfTheCommandLine) {
  const Origin origin{Origin::Kind::command_line, "", 0};
  EXPECT_EQ(parse_yaml_value("#include <a>: b", origin).text, "#include <a>: b");
  EXPECT_EQ(parse_yaml_value("", origin).kind, YamlNode::Kind::scalar);
  EXPECT_EQ(parse_yaml_value("[1, [2], {a: 3}]", origin).items[2].find("a")->value.text, "3");
  EXPECT_EQ(parse_yaml_value("[1, 2]", origin).items[1].origin.text(), "command line");
  EXPECT_TRUE(parse_yaml_value("\"1\"", origin).quoted);
  EXPECT_THAT(error_of(Fault::input, [&] { parse_yaml_value("[1, 2", origin); }), StartsWith("[command line] not YAML"));
  EXPECT_THAT(error_of(Fault::input, [&] { parse_yaml_value("a\xFF", origin); }), HasSubstr("not UTF-8"));
}

class YamlFile : public testing::RecipeTest {};

TEST_F(YamlFile, RefusesWhatIsNoReadableFile) {
  const auto read = [](const std::string& path) { return error_of(Fault::input, [&] { read_yaml_file(path); }); };
  EXPECT_THAT(read(folder + "/none.yaml"), AllOf(HasSubstr("none.yaml]"), HasSubstr("no such file")));
  EXPECT_THAT(read(folder), HasSubstr("this is a folder"));
  EXPECT_THAT(read("/dev/zero"), HasSubstr("not a regular file"));
  EXPECT_THAT(read(""), HasSubstr("no such file"));
  EXPECT_THAT(read(write("empty.yaml", "")), HasSubstr("nothing in it"));
  EXPECT_THAT(read(write("big.yaml", "a: 1\n" + std::string(std::size_t{2} << 20, '#'))),
              HasSubstr("larger than 1048576 bytes"));
}

/// Whatever the bytes, the reader gives a tree or Error(input), and nothing else.
void survive(const std::string& text) {
  try {
    parse_yaml(text, file);
  } catch (const Error& e) {
    ASSERT_EQ(e.fault(), Fault::input) << e.what();
    ASSERT_THAT(e.what(), StartsWith("[r.yaml"));
  }
}

const std::string sample =
    "# a recipe\nextends: base.yaml\nmodel:\n  plugin: gpt\n  layers: &l 6\n  betas: [0.9, 0.95]\n  more: {a: 'b', \"c\": "
    "*l}\n"
    "text: |\n  some\n  \xC3\xA9 text\nfolded: >-\n  x\n  y\nsets:\n- path: a\n  weight: 1e-3\n- path: \"b\\n\"\n? k\n: v\n";

TEST(YamlFuzz, EveryTruncation) {
  for (std::size_t n = 0; n <= sample.size(); ++n) survive(sample.substr(0, n));
}

TEST(YamlFuzz, EveryByteFlippedToEverySpecial) {
  const std::string special = std::string("[]{}:,-?*&!|>'\"%@#\n\t \\~`\xFF\x80", 26) + '\0';
  for (std::size_t i = 0; i < sample.size(); ++i) {
    for (const char c : special) {
      std::string text = sample;
      text[i] = c;
      survive(text);
    }
    for (int bit = 0; bit < 8; ++bit) {
      std::string text = sample;
      text[i] = static_cast<char>(text[i] ^ (1 << bit));
      survive(text);
    }
  }
}

TEST(YamlFuzz, RandomEditsAndRandomText) {
  std::mt19937 random(20);
  const std::string letters = "[]{}:,-?*&!|>'\"%@#\n\t ab01~\\.<`";
  for (int round = 0; round < 20'000; ++round) {
    std::string text = round % 2 ? sample : "";
    for (unsigned edits = 1 + random() % 12; edits > 0; --edits) {
      const std::size_t at = text.empty() ? 0 : random() % text.size();
      const char c = letters[random() % letters.size()];
      if (text.empty() || random() % 2)
        text.insert(at, 1, c);
      else if (random() % 2)
        text[at] = c;
      else
        text.erase(at, random() % 5);
    }
    survive(text);
  }
}

}  // namespace
}  // namespace capstan
