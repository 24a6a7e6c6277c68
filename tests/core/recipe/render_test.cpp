// What to_yaml() writes reads back as the same recipe; origins, the digest and the help texts.
#include "recipe_fixture.h"

#include <cmath>
#include <cstring>
#include <random>

namespace capstan::testing {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Type = OptionSpec::Type;

class RenderTest : public RecipeTest {
 protected:
  /// Writes the resolved recipe elsewhere, loads that, and gives its text.
  std::string again(const std::string& yaml) { return to_yaml(load(write("elsewhere/again.yaml", yaml))); }
};

TEST_F(RenderTest, RoundTripOfRecipes) {
  const std::string hybrid = minimal().substr(minimal().find('\n') + 1);
  const std::vector<std::string> texts = {
      minimal(),
      minimal("optimizer: {plugin: muon, lr: 0.30000000000000004, others: {plugin: sgd, lr: 1e-300}}\n"),
      minimal("run: {dir: a/../b c, seed: 9007199254740993}\nplugin_path: [x, \"y, z\"]\n"),
      "model:\n  plugin: hybrid\n  pattern: [identity, {plugin: attention, heads: 2}, identity]\n" + hybrid,
      "model: {plugin: hybrid, pattern: []}\n" + hybrid,
  };
  for (const auto& text : texts) {
    const Recipe recipe = load(write("r.yaml", text));
    const std::string yaml = to_yaml(recipe);
    EXPECT_EQ(again(yaml), yaml) << text;
    EXPECT_EQ(again(to_yaml(recipe, Origins::show)), yaml) << "comments must not change it";
  }
}

TEST_F(RenderTest, ValuesSurviveTheRoundTrip) {
  const Recipe recipe =
      load(write("sub/r.yaml", minimal("run: {seed: 9007199254740993, dir: out}\noptimizer: {lr: 0.1}\n")));
  const Recipe second = load(write("elsewhere/again.yaml", to_yaml(recipe)));
  EXPECT_EQ(second.options.group("run").integer("seed"), 9007199254740993);
  EXPECT_EQ(second.options.group("run").path("dir"), folder + "/sub/out");
  EXPECT_EQ(second.options.plugin("optimizer").options.number("lr"), 0.1);
  EXPECT_EQ(second.options.group("data").groups("sets")[0].path("path"), folder + "/sub/data/set");
  EXPECT_FALSE(second.options.plugin("model").options.has("dropout"));
}

TEST_F(RenderTest, AnyTextSurvives) {
  Schema schema;
  schema.text("t", "", "");
  schema.list(Type::texts, "l", "[]", "");
  std::vector<std::string> texts = {"",
                                    " ",
                                    "a",
                                    "true",
                                    "No",
                                    "null",
                                    "~",
                                    "1",
                                    "1e3",
                                    "-",
                                    "- a",
                                    "a: b",
                                    "#x",
                                    "a #b",
                                    "'",
                                    "\"",
                                    "\\",
                                    "a\nb",
                                    "\n",
                                    "\t",
                                    "\r\n",
                                    "[",
                                    "{",
                                    "*a",
                                    "&a",
                                    "!a",
                                    "%",
                                    "@",
                                    "`",
                                    "|",
                                    ">",
                                    "?",
                                    ":",
                                    ",",
                                    "--- x",
                                    "...",
                                    "\x01\x7F",
                                    "\xC3\xA9",
                                    "\xE2\x80\xA8",
                                    "\xC2\x85",
                                    "\xEF\xBB\xBF",
                                    "\xF0\x9F\x98\x80",
                                    "a/b.c-d_e",
                                    "/x y",
                                    "Inf",
                                    ".5",
                                    std::string(5000, 'w')};
  std::mt19937 random(3);
  const std::string letters = "ab01 \n\t\r:#'\"\\[]{},&*!|>%@`-?~.\x02";
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (unsigned n = random() % 12; n > 0; --n) text += letters[random() % letters.size()];
    texts.push_back(text);
  }
  // A control character cannot be in the file itself, so the first writing is escaped by hand.
  const auto escaped = [](const std::string& text) {
    static const char* digits = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : text) {
      const auto u = static_cast<unsigned char>(c);
      if (u < 0x20 || c == '"' || c == '\\' || u == 0x7F)
        out += std::string("\\x") + digits[u >> 4] + digits[u & 15];
      else
        out += c;
    }
    return out + '"';
  };
  for (const auto& text : texts) {
    const Options first = parse_options(schema, "t: " + escaped(text) + "\nl: [" + escaped(text) + ", z]\n");
    ASSERT_EQ(first.text("t"), text);
    const std::string yaml = to_yaml(first);
    const Options second = parse_options(schema, yaml);
    ASSERT_EQ(second.text("t"), text) << yaml;
    ASSERT_THAT(second.texts("l"), ElementsAre(text, "z")) << yaml;
  }
}

TEST_F(RenderTest, AnyNumberSurvives) {
  Schema schema;
  schema.number("x", 0, "");
  schema.integer("n", 0, "");
  std::mt19937_64 random(4);
  for (int i = 0; i < 5000; ++i) {
    const std::uint64_t bits = random();
    double x;
    static_assert(sizeof(x) == sizeof(bits));
    std::memcpy(&x, &bits, sizeof(x));
    if (!std::isfinite(x)) continue;
    const auto n = static_cast<std::int64_t>(random());
    Schema defaults;  // declared defaults go through the same writing and reading
    defaults.number("x", x, "");
    defaults.integer("n", n, "");
    const Options first = parse_options(defaults, "");
    ASSERT_EQ(first.number("x"), x);
    const Options second = parse_options(schema, to_yaml(first));
    ASSERT_EQ(second.number("x"), x) << to_yaml(first);
    ASSERT_EQ(second.integer("n"), n) << to_yaml(first);
  }
}

TEST_F(RenderTest, ShowsOrigins) {
  write("base.yaml", minimal("optimizer: {plugin: adamw, lr: 1e-3}\n"));
  const std::string path = write("r.yaml", "extends: base.yaml\nschedule:\n  warmup: 5\n");
  const std::string text = to_yaml(load(path, {"train.steps=20", "optimizer.weight_decay=0"}), Origins::show);
  EXPECT_THAT(text,
              AllOf(ContainsRegex("  warmup: 5 +# " + path + ":3\n"), ContainsRegex("  steps: 20 +# command line\n"),
                    ContainsRegex("  lr: 0.001 +# " + folder + "/base.yaml:7\n"), ContainsRegex("  seed: 1 +# default\n"),
                    ContainsRegex("  plugin: adamw +# " + folder + "/base.yaml:7\n"),
                    ContainsRegex("  weight_decay: 0 +# command line\n"), ContainsRegex("  # dropout: +# not given\n")));
  EXPECT_THAT(to_yaml(load(path)), Not(HasSubstr("#")));
}

TEST_F(RenderTest, DigestFollowsValuesOnly) {
  const auto digest = [&](const std::string& name, const std::string& text, const std::vector<std::string>& words = {}) {
    return recipe_digest(load(write(name, text), words).options);
  };
  const std::string one = digest("a.yaml", minimal("optimizer: {plugin: adamw, lr: 1e-3}\n"));
  EXPECT_THAT(one, ContainsRegex("^[0-9a-f]{16}$"));
  EXPECT_EQ(digest("b.yaml", minimal("# a comment\noptimizer:\n  lr: 0.001\n")), one);
  EXPECT_EQ(digest("c.yaml", minimal(), {"optimizer.lr=0.1e-2"}), one);
  EXPECT_NE(digest("d.yaml", minimal()), one);
  EXPECT_NE(digest("e.yaml", minimal("optimizer: {plugin: adamw, lr: 1.0000000000000002e-3}\n")), one);
  // The digest of fixed options is part of what a stored run says of itself: it must stay.
  Schema schema;
  schema.integer("n", 1, "");
  schema.text("t", "a b", "");
  ASSERT_EQ(to_yaml(parse_options(schema, "")), "n: 1\nt: \"a b\"\n");
  EXPECT_EQ(recipe_digest(parse_options(schema, "")), recipe_digest(parse_options(schema, "t: 'a b'\nn: 1e0\n")));
}

TEST_F(RenderTest, HelpNamesEverything) {
  Schema inner;
  inner.number("rate", 0.5, "how fast").range(0, 1).in("1/s");
  Schema s;
  s.required(Type::integer, "layers", "number of blocks").at_least(1);
  s.text("mode", "a|b", "").one_of({"a|b", "c"});
  s.group("inner", inner, "a group");
  s.groups("many", inner, "several");
  s.plugin("optimizer", "opt", "adamw", "how");
  const std::string text = help_text(s);
  EXPECT_THAT(
      text,
      AllOf(HasSubstr("  layers  (integer, at least 1, required)\n      number of blocks\n"),
            HasSubstr("  inner  (map)\n      a group\n    rate  (number, 0 to 1, in 1/s, default 0.5)\n        how fast\n"),
            HasSubstr("opt  (optimizer plugin, default adamw)")));
  const std::string table = help_markdown(s);
  EXPECT_THAT(table, AllOf(HasSubstr("| `layers` | integer | required | at least 1 | number of blocks |\n"),
                           HasSubstr("| `inner.rate` | number | `0.5` | 0 to 1, in 1/s | how fast |\n"),
                           HasSubstr("| `many[].rate` |"), HasSubstr("one of a\\|b, c")));
}

}  // namespace
}  // namespace capstan::testing
