// Schemas and Options by themselves: builders, defaults, types, ranges, access by name.
#include "recipe_fixture.h"

#include <capstan/options.h>

#include <utility>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using Type = OptionSpec::Type;

Schema every_type() {
  Schema inner;
  inner.integer("k", 7, "");
  Schema s;
  s.flag("flag", true, "");
  s.integer("integer", -3, "").range(-10, 1'000'000'000'000);
  s.number("number", 1e-3, "").above(0).in("seconds");
  s.text("text", "a: \"b\"\n", "");
  s.text("choice", "red", "").one_of({"red", "green"});
  s.path("path", "", "");
  s.list(Type::integers, "integers", "[1, 2]", "").range(0, 9);
  s.list(Type::numbers, "numbers", "[0.5]", "");
  s.list(Type::texts, "texts", "", "").one_of({"x", "y"});
  s.list(Type::paths, "paths", "[]", "");
  s.group("group", inner, "");
  s.groups("groups", inner, "");
  s.optional(Type::number, "optional", "").range(0, 1);
  return s;
}

std::string refusal(const Schema& schema, const std::string& yaml) {
  return error_of(Fault::input, [&] { parse_options(schema, yaml); });
}

TEST(Options, DefaultsAreComplete) {
  const Options o = parse_options(every_type(), "");
  EXPECT_TRUE(o.flag("flag"));
  EXPECT_EQ(o.integer("integer"), -3);
  EXPECT_EQ(o.number("number"), 1e-3);
  EXPECT_EQ(o.text("text"), "a: \"b\"\n");
  EXPECT_EQ(o.text("choice"), "red");
  EXPECT_EQ(o.path("path"), "");
  EXPECT_THAT(o.integers("integers"), ElementsAre(1, 2));
  EXPECT_THAT(o.numbers("numbers"), ElementsAre(0.5));
  EXPECT_THAT(o.texts("texts"), IsEmpty());
  EXPECT_THAT(o.paths("paths"), IsEmpty());
  EXPECT_EQ(o.group("group").integer("k"), 7);
  EXPECT_THAT(o.groups("groups"), IsEmpty());
  EXPECT_FALSE(o.has("optional"));
  EXPECT_TRUE(o.has("flag"));
}

TEST(Options, ValuesOfEveryType) {
  const Options o =
      parse_options(every_type(),
                    "flag: false\ninteger: 1e6\nnumber: +2.5e-1\ntext: 007\nchoice: green\npath: /a/../b\n"
                    "integers: [3]\nnumbers: []\ntexts: [y]\npaths: [/c/./d]\ngroup: {k: 8}\ngroups: [{k: 9}]\n"
                    "optional: 0.5\n");
  EXPECT_FALSE(o.flag("flag"));
  EXPECT_EQ(o.integer("integer"), 1'000'000);
  EXPECT_EQ(o.number("number"), 0.25);
  EXPECT_EQ(o.text("text"), "007");
  EXPECT_EQ(o.text("choice"), "green");
  EXPECT_EQ(o.path("path"), "/b");
  EXPECT_THAT(o.integers("integers"), ElementsAre(3));
  EXPECT_THAT(o.numbers("numbers"), IsEmpty());
  EXPECT_THAT(o.texts("texts"), ElementsAre("y"));
  EXPECT_THAT(o.paths("paths"), ElementsAre("/c/d"));
  EXPECT_EQ(o.group("group").integer("k"), 8);
  EXPECT_EQ(o.groups("groups").at(0).integer("k"), 9);
  EXPECT_EQ(o.number("optional"), 0.5);
}

TEST(Options, Integers) {
  Schema s;
  s.integer("n", 0, "");
  const auto read = [&](const std::string& text) { return parse_options(s, "n: " + text).integer("n"); };
  EXPECT_EQ(read("12"), 12);
  EXPECT_EQ(read("-12"), -12);
  EXPECT_EQ(read("+12"), 12);
  EXPECT_EQ(read("1e6"), 1'000'000);
  EXPECT_EQ(read("2.5e3"), 2500);
  EXPECT_EQ(read("3.0"), 3);
  EXPECT_EQ(read("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(read("-9223372036854775808"), INT64_MIN);
  const auto wrong = [&](const std::string& text) { return refusal(s, "n: " + text); };
  EXPECT_THAT(wrong("six"), AllOf(StartsWith("[options:1, n] "), HasSubstr("expected an integer, got 'six'")));
  EXPECT_THAT(wrong("1_000"), HasSubstr("without _"));
  EXPECT_THAT(wrong("2.5"), HasSubstr("expected a whole number, got '2.5'"));
  EXPECT_THAT(wrong("1e-3"), HasSubstr("whole number"));
  EXPECT_THAT(wrong("9223372036854775808"), HasSubstr("2^53"));
  EXPECT_THAT(wrong("1e300"), HasSubstr("2^53"));
  EXPECT_THAT(wrong("1e999"), HasSubstr("expected an integer"));
  EXPECT_THAT(wrong("\"6\""), HasSubstr("got the text '6'"));
  EXPECT_THAT(wrong("0x10"), HasSubstr("expected an integer"));
  EXPECT_THAT(wrong("true"), HasSubstr("expected an integer, got 'true'"));
  EXPECT_THAT(wrong("[1]"), HasSubstr("expected an integer, got a list"));
  EXPECT_THAT(wrong("{a: 1}"), HasSubstr("got a map"));
  EXPECT_THAT(wrong(""), HasSubstr("got nothing"));
  EXPECT_THAT(wrong("12 "
                    "13"),
              HasSubstr("got '12 13'"));
}

TEST(Options, Numbers) {
  Schema s;
  s.number("x", 0, "");
  const auto read = [&](const std::string& text) { return parse_options(s, "x: " + text).number("x"); };
  EXPECT_EQ(read("1e-3"), 1e-3);
  EXPECT_EQ(read("1E-3"), 1e-3);
  EXPECT_EQ(read(".5"), 0.5);
  EXPECT_EQ(read("-0.1"), -0.1);
  EXPECT_EQ(read("3"), 3.0);
  const auto wrong = [&](const std::string& text) { return refusal(s, "x: " + text); };
  for (const char* text : {".inf", "inf", "nan", "1e999", "-inf"}) EXPECT_THAT(wrong(text), HasSubstr("number")) << text;
  EXPECT_THAT(wrong("1_0.5"), HasSubstr("without _"));
  EXPECT_THAT(wrong("1e"), HasSubstr("expected a number, got '1e'"));
  EXPECT_THAT(wrong("'1'"), HasSubstr("got the text '1'"));
  EXPECT_THAT(wrong("+-1"), HasSubstr("expected a number"));
}

TEST(Options, Flags) {
  Schema s;
  s.flag("f", false, "");
  EXPECT_TRUE(parse_options(s, "f: true").flag("f"));
  for (const char* text : {"yes", "on", "True", "1", "\"true\"", "[true]", ""}) {
    EXPECT_THAT(refusal(s, std::string("f: ") + text), HasSubstr("expected true or false, got")) << text;
  }
}

TEST(Options, Ranges) {
  const Schema s = every_type();
  EXPECT_THAT(refusal(s, "integer: -11"),
              HasSubstr("[options:1, integer] out of range: expected -10 to 1000000000000, got -11"));
  EXPECT_THAT(refusal(s, "number: 0"), HasSubstr("expected above 0 seconds, got 0"));
  EXPECT_THAT(refusal(s, "number: fast"), HasSubstr("(in seconds)"));
  EXPECT_THAT(refusal(s, "integers: [1, 10]"), HasSubstr("[options:1, integers.1] out of range: expected 0 to 9, got 10"));
  EXPECT_THAT(refusal(s, "optional: 1.5"), HasSubstr("0 to 1"));
  EXPECT_THAT(refusal(s, "choice: greem"), HasSubstr("expected one of red, green, got 'greem'; did you mean 'green'?"));
  EXPECT_THAT(refusal(s, "texts: [x, z]"), HasSubstr("[options:1, texts.1] expected one of x, y"));
  EXPECT_EQ(parse_options(s, "integer: -10").integer("integer"), -10);  // bounds are inside
}

TEST(Options, Lists) {
  const Schema s = every_type();
  const Options o = parse_options(s, "integers: [9, 1e0]\ntexts: [x, y, x]\nnumbers:\n- 1\n- 2.5\n");
  EXPECT_THAT(o.integers("integers"), ElementsAre(9, 1));
  EXPECT_THAT(o.texts("texts"), ElementsAre("x", "y", "x"));
  EXPECT_THAT(o.numbers("numbers"), ElementsAre(1, 2.5));
  EXPECT_THAT(refusal(s, "integers: 3"), HasSubstr("expected a list of integers, got '3'; write [...]"));
  EXPECT_THAT(refusal(s, "integers: [1, a]"), HasSubstr("integers.1] expected an integer, got 'a'"));
  EXPECT_THAT(refusal(s, "groups: {k: 1}"), HasSubstr("expected a list of maps, got a map"));
  EXPECT_THAT(refusal(s, "groups: [1]"), HasSubstr("[options:1, groups.0] expected a map of its keys, got '1'"));
  EXPECT_THAT(refusal(s, "group: 1"), HasSubstr("[options:1, group] expected a map"));
  EXPECT_THAT(refusal(s, "group:"), HasSubstr("got nothing"));
  EXPECT_EQ(parse_options(s, "groups: [{k: 1}, {}]").groups("groups")[1].integer("k"), 7);
}

TEST(Options, TextsAreTakenAsWritten) {
  Schema s;
  s.text("t", "", "");
  EXPECT_EQ(parse_options(s, "t: 007").text("t"), "007");
  EXPECT_EQ(parse_options(s, "t: yes").text("t"), "yes");
  EXPECT_EQ(parse_options(s, "t: \"a\\tb\"").text("t"), "a\tb");
  EXPECT_THAT(refusal(s, "t: null"), HasSubstr("expected a text, got nothing"));
  EXPECT_THAT(refusal(s, "t: [a]"), HasSubstr("expected a text, got a list"));
}

TEST(Options, UnknownKeysNameTheNearest) {
  const Schema s = every_type();
  EXPECT_THAT(refusal(s, "flag: true\nnumbr: 1\n"),
              AllOf(StartsWith("[options:2] unknown key 'numbr'"), HasSubstr("did you mean 'number'?"),
                    HasSubstr("known: flag, integer")));
  EXPECT_THAT(refusal(s, "group:\n  kk: 1\n"),
              AllOf(StartsWith("[options:2, group] unknown key 'kk' in group"), HasSubstr("'k'")));
  EXPECT_THAT(refusal(s, "qqqqqqqqqqqq: 1"), ::testing::Not(HasSubstr("did you mean")));
  EXPECT_THAT(refusal(Schema{}, "a: 1"), HasSubstr("it has no options"));
  EXPECT_THAT(refusal(s, "plugin: x"), HasSubstr("unknown key 'plugin'"));
}

TEST(Options, SeveralFindingsInOneMessage) {
  const std::string text = refusal(every_type(), "integer: x\nnumber: -1\nnope: 3\n");
  EXPECT_THAT(text, AllOf(StartsWith("3 things are wrong"), HasSubstr("[options:1, integer]"),
                          HasSubstr("[options:2, number]"), HasSubstr("[options:3] unknown key 'nope'")));
}

TEST(Options, MissingRequiredOptions) {
  Schema inner;
  inner.required(Type::integer, "size", "how large").at_least(1);
  Schema s;
  s.required(Type::path, "file", "what to read");
  s.group("group", inner, "");
  EXPECT_THAT(refusal(s, "group: {size: 1}"), HasSubstr("[options:1, file] missing; expected a path: what to read"));
  EXPECT_THAT(refusal(s, "file: x"),
              HasSubstr("[options:1, group.size] missing; expected an integer, at least 1: how large"));
}

TEST(Options, WrongAccessIsAProgrammingError) {
  const Options o = parse_options(every_type(), "");
  const auto wrong = [](auto call) { return error_of(Fault::programming, call); };
  EXPECT_THAT(wrong([&] { o.integer("intege"); }),
              AllOf(HasSubstr("no option 'intege'"), HasSubstr("did you mean 'integer'?")));
  EXPECT_THAT(wrong([&] { o.number("integer"); }),
              AllOf(HasSubstr("'integer'"), HasSubstr("as a number"), HasSubstr("as an integer")));
  EXPECT_THAT(wrong([&] { o.path("text"); }), AllOf(HasSubstr("as a path"), HasSubstr("declared as a text")));
  EXPECT_THAT(wrong([&] { o.paths("texts"); }), HasSubstr("declared as a list of texts"));
  EXPECT_EQ(o.text("path"), "");  // a path is a text, a text is no path
  EXPECT_THAT(o.texts("paths"), IsEmpty());
  EXPECT_THAT(wrong([&] { o.number("optional"); }), HasSubstr("has()"));
  EXPECT_THAT(wrong([&] { o.has("nope"); }), HasSubstr("no option 'nope'"));
  EXPECT_THAT(wrong([&] { o.where("nope"); }), HasSubstr("no option 'nope'"));
  EXPECT_THAT(wrong([] { Options().flag("x"); }), HasSubstr("no option 'x'"));
}

TEST(Options, CopiesAndMovesKeepTheValues) {
  Options a = parse_options(every_type(), "integer: 5");
  Options b = a;
  Options c = std::move(a);
  EXPECT_EQ(b.integer("integer"), 5);
  EXPECT_EQ(c.integer("integer"), 5);
  b = parse_options(every_type(), "integer: 6");
  EXPECT_EQ(b.integer("integer"), 6);
  EXPECT_EQ(c.integer("integer"), 5);
}

TEST(Options, WhereAndRefuse) {
  const Options o = parse_options(every_type(), "\n\ninteger: 5\ngroup:\n  k: 2\n", nullptr, "x.yaml");
  EXPECT_EQ(o.where("integer"), "x.yaml:3, integer");
  EXPECT_EQ(o.where("flag"), "flag (default)");
  EXPECT_EQ(o.group("group").where("k"), "x.yaml:5, group.k");
  EXPECT_EQ(error_of(Fault::input, [&] { o.refuse("integer", "5 is odd"); }), "[x.yaml:3, integer] 5 is odd");
}

TEST(Schema, BadDeclarationsAreProgrammingErrors) {
  const auto wrong = [](auto call) { return error_of(Fault::programming, call); };
  Schema s;
  s.flag("a", true, "");
  EXPECT_THAT(wrong([&] { s.integer("a", 1, ""); }), HasSubstr("'a' is declared twice"));
  EXPECT_THAT(wrong([&] { s.integer("plugin", 1, ""); }), HasSubstr("'plugin'"));
  for (const char* name : {"", "0", "a.b", "a b", "a-b", "1x"}) {
    EXPECT_THAT(wrong([&] { s.integer(name, 1, ""); }), HasSubstr("option name")) << name;
  }
  EXPECT_THAT(wrong([&] { s.list(Type::flag, "l", "[]", ""); }), HasSubstr("expected integers"));
  const auto parse = [](Schema schema) { return [schema] { parse_options(schema, ""); }; };
  Schema bad_default;
  bad_default.list(Type::integers, "l", "[1, x]", "");
  EXPECT_THAT(wrong(parse(bad_default)), HasSubstr("the declared default: expected an integer, got 'x'"));
  Schema out_of_range;
  out_of_range.number("n", 2, "").range(0, 1);
  EXPECT_THAT(wrong(parse(out_of_range)), HasSubstr("the declared default: out of range"));
  Schema no_yaml;
  no_yaml.list(Type::integers, "l", "[1", "");
  EXPECT_THAT(wrong(parse(no_yaml)), HasSubstr("not YAML"));
  Schema no_group;
  no_group.required(Type::group, "g", "");
  EXPECT_THAT(wrong(parse(no_group)), HasSubstr("OptionSpec::group"));
  Schema no_kind;
  no_kind.required(Type::plugin, "p", "");
  EXPECT_THAT(wrong(parse(no_kind)), HasSubstr("OptionSpec::plugin_kind"));
}

TEST(Schema, FindAndOrder) {
  const Schema s = every_type();
  ASSERT_NE(s.find("number"), nullptr);
  EXPECT_EQ(s.find("number")->unit, "seconds");
  EXPECT_EQ(s.find("nope"), nullptr);
  EXPECT_EQ(s.options().front().name, "flag");
}

}  // namespace
}  // namespace capstan
