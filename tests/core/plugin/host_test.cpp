// What the plugin host finds, loads and makes, and how it refuses.
#include "plugin/host.h"
#include "core/plugin/helpers.h"

#include <capstan/tokenizer.h>

#include <gmock/gmock.h>

#include <optional>

namespace capstan::plugin_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::string make_text(const std::string& mode) { return "{mode: " + mode + "}"; }

/// A choice as a recipe makes it.
PluginChoice choose(PluginHost& host, const std::string& name, const std::string& yaml = "{}") {
  return {"tokenizer", name, parse_options(host.schema("tokenizer", name, ""), yaml, &host)};
}

/// Sets a variable of the environment for one test.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    ::setenv(name, value.c_str(), 1);
  }
  ~Environment() { old_ ? ::setenv(name_, old_->c_str(), 1) : ::unsetenv(name_); }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

class WorkingFolder {
 public:
  explicit WorkingFolder(const fs::path& folder) : old_(fs::current_path()) { fs::current_path(folder); }
  ~WorkingFolder() { fs::current_path(old_); }

 private:
  fs::path old_;
};

TEST(PluginHost, MakesWhatARecipeNames) {
  Prefix prefix;
  const fs::path file = prefix.put("good");
  PluginHost host(prefix.program);
  EXPECT_TRUE(host.loaded().empty());
  const auto tokenizer = host.make_as<Tokenizer>(choose(host, "good"));
  EXPECT_EQ(tokenizer->vocabulary(), 26);
  std::vector<std::int32_t> tokens;
  tokenizer->encode("cab", tokens);
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{2, 0, 1}));
  ASSERT_EQ(host.loaded().size(), 1u);
  const LoadedPlugin loaded = host.loaded()[0];
  EXPECT_EQ(loaded.kind, "tokenizer");
  EXPECT_EQ(loaded.name, "good");
  EXPECT_EQ(loaded.version, "1.2.3");
  EXPECT_EQ(loaded.file, file.string());
}

TEST(PluginHost, FileHashTellsBuildsApart) {
  Prefix a, b;
  a.put("good");
  write_bytes(b.plugins / "good.so", read_bytes(library("good")) + "one byte more");
  PluginHost host_a(a.program), host_b(b.program), host_c(a.program);
  for (PluginHost* host : {&host_a, &host_b, &host_c}) host->schema("tokenizer", "good", "");
  EXPECT_NE(host_a.loaded()[0].xxh3, host_b.loaded()[0].xxh3);
  EXPECT_EQ(host_a.loaded()[0].xxh3, host_c.loaded()[0].xxh3);
}

TEST(PluginHost, MatchesByWhatIsInsideNotByFileName) {
  Prefix prefix;
  prefix.put("good", "optimizer_adamw.so");
  PluginHost host(prefix.program);
  EXPECT_EQ(host.make_as<Tokenizer>(choose(host, "good"))->vocabulary(), 26);
  EXPECT_THROW(host.schema("optimizer", "adamw", ""), Error);
}

TEST(PluginHost, ObjectsOutliveTheHost) {
  Prefix prefix;
  prefix.put("good");
  std::shared_ptr<Tokenizer> tokenizer;
  std::exception_ptr thrown;
  {
    PluginHost host(prefix.program);
    tokenizer = host.make_as<Tokenizer>(choose(host, "good"));
    try {
      host.make(choose(host, "good", make_text("input")));
    } catch (...) {
      thrown = std::current_exception();
    }
  }
  EXPECT_EQ(tokenizer->name(), "good");
  EXPECT_THROW(std::rethrow_exception(thrown), Error);
}

TEST(PluginHost, FurtherRegistrationsCountOnceLoaded) {
  Prefix prefix;
  prefix.put("good");
  PluginHost host(prefix.program);
  EXPECT_THROW(host.schema("tokenizer", "good_outer", ""), Error);
  host.schema("tokenizer", "good", "");
  EXPECT_EQ(host.make_as<Tokenizer>(choose(host, "good_outer"))->vocabulary(), 26);
}

TEST(PluginHost, ChoiceTakesDefaultsAndOverrides) {
  Prefix prefix;
  prefix.put("good");
  PluginHost host(prefix.program);
  EXPECT_EQ(host.choice("tokenizer", "good", {}).options.text("mode"), "work");
  const std::vector<std::pair<std::string, std::string>> overrides{{"mode", "input"}};
  EXPECT_EQ(host.choice("tokenizer", "good", overrides).options.text("mode"), "input");
  const std::vector<std::pair<std::string, std::string>> wrong{{"mood", "input"}};
  EXPECT_THAT(error_of([&] { host.choice("tokenizer", "good", wrong); }).text, AllOf(HasSubstr("mood"), HasSubstr("mode")));
}

TEST(PluginHost, BuiltInsNeedNoFile) {
  Prefix prefix;
  PluginHost host(prefix.program);
  host.add("tokenizer", "built_in", {}, [](const Options&, Registrar&) -> std::shared_ptr<void> { return nullptr; });
  const Caught caught = error_of([&] { host.make(choose(host, "built_in")); });
  EXPECT_EQ(caught.fault, Fault::programming);
  EXPECT_THAT(caught.text, HasSubstr("in tokenizer 'built_in'"));
  EXPECT_EQ(error_of([&] { host.add("tokenizer", "x", {}, nullptr); }).fault, Fault::programming);
  EXPECT_THAT(error_of([&] { host.add("tokenizr", "x", {}, nullptr); }).text,
              AllOf(HasSubstr("no plugin kind 'tokenizr'"), HasSubstr("did you mean 'tokenizer'?")));
}

// ---- errors of factories --------------------------------------------------------------------------------------------

TEST(PluginHost, FactoryErrorsKeepTheirFaultAndGainAPlace) {
  Prefix prefix;
  const fs::path file = prefix.put("good");
  PluginHost host(prefix.program);
  const std::string place = "in tokenizer plugin good 1.2.3 (" + file.string() + ")";
  const struct {
    const char* mode;
    Fault fault;
    const char* text;
  } cases[] = {
      {"input", Fault::input, "the letters are wrong"},
      {"programming", Fault::programming, "a contract is broken"},
      {"memory", Fault::runtime, "bad_alloc"},
      {"number", Fault::programming, "no std::exception"},
      {"nothing", Fault::programming, "returned nothing"},
  };
  for (const auto& c : cases) {
    const Caught caught = error_of([&] { host.make(choose(host, "good", make_text(c.mode))); });
    EXPECT_EQ(caught.fault, c.fault) << c.mode;
    EXPECT_THAT(caught.text, AllOf(HasSubstr(c.text), HasSubstr(place)));
  }
}

TEST(PluginHost, NestedFactoriesAreAllNamed) {
  Prefix prefix;
  prefix.put("good");
  PluginHost host(prefix.program);
  host.schema("tokenizer", "good", "");
  const Caught caught = error_of([&] { host.make(choose(host, "good_outer", "{inner: {plugin: good, mode: input}}")); });
  EXPECT_EQ(caught.fault, Fault::input);
  const auto inner = caught.text.find("in tokenizer plugin good 1.2.3"),
             outer = caught.text.find("in tokenizer plugin good_outer");
  ASSERT_NE(inner, std::string::npos);
  ASSERT_NE(outer, std::string::npos);
  EXPECT_LT(inner, outer);
}

// ---- where plugins are found ----------------------------------------------------------------------------------------

TEST(PluginHost, PathsAreRelativeToTheRecipe) {
  Prefix prefix;
  TempFolder recipe;
  fs::create_directories(recipe.path / "libraries");
  fs::copy_file(library("good"), recipe.path / "libraries/mine.so");
  fs::copy_file(library("good"), recipe.path / "beside.so");
  const std::string folder = (recipe.path / "libraries").string();
  const std::string forms[] = {"./mine.so", "mine.so", "../beside.so", (recipe.path / "beside.so").string(),
                               "../libraries/./mine.so"};
  for (const std::string& name : forms) {
    PluginHost host(prefix.program);
    EXPECT_EQ(host.schema("tokenizer", name, folder).options().size(), 1u) << name;
    // The name that the recipe says is the name that makes it.
    EXPECT_EQ(
        host.make_as<Tokenizer>({"tokenizer", name, parse_options(host.schema("tokenizer", name, folder), "{}")})->name(),
        "good");
  }
  PluginHost host(prefix.program);
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "./mine.so", ""); }).text, HasSubstr("relative"));
}

TEST(PluginHost, OneRelativePathCannotMeanTwoFiles) {
  Prefix prefix;
  TempFolder a, b;
  fs::copy_file(library("good"), a.path / "mine.so");
  fs::copy_file(library("good"), b.path / "mine.so");
  PluginHost host(prefix.program);
  host.schema("tokenizer", "mine.so", a.path.string());
  host.schema("tokenizer", "mine.so", a.path.string());
  EXPECT_THAT(error_of([&] { host.schema("tokenizer", "mine.so", b.path.string()); }).text,
              AllOf(HasSubstr((a.path / "mine.so").string()), HasSubstr((b.path / "mine.so").string())));
}

TEST(PluginHost, SearchesRecipeThenEnvironmentThenPrefix) {
  Prefix prefix;
  TempFolder from_recipe, from_environment;
  const Environment environment("CAPSTAN_PLUGIN_PATH", ":" + from_environment.path.string() + ":/nowhere/at/all:");
  PluginHost host(prefix.program);
  host.add_search_path(from_recipe.path.string());
  EXPECT_THAT(host.search_path(), testing::ElementsAre(from_recipe.path.string(), from_environment.path.string(),
                                                       "/nowhere/at/all", prefix.plugins.string()));
  fs::copy_file(library("good"), from_environment.path / "good.so");
  EXPECT_EQ(host.schema("tokenizer", "good", "").options().size(), 1u);
  const std::string text = error_of([&] { host.schema("tokenizer", "goo", ""); }).text;
  EXPECT_THAT(text, AllOf(HasSubstr(from_recipe.path.string()), HasSubstr("/nowhere/at/all (no such folder)")));
}

TEST(PluginHost, NeverSearchesTheWorkingFolder) {
  Prefix prefix;
  TempFolder here;
  fs::copy_file(library("good"), here.path / "tokenizer_good.so");
  const WorkingFolder working(here.path);
  {
    PluginHost host(prefix.program);
    EXPECT_THROW(host.schema("tokenizer", "good", ""), Error);
  }
  for (const char* value : {".", "plugins", "/tmp:.", ".:/tmp"}) {
    const Environment environment("CAPSTAN_PLUGIN_PATH", value);
    EXPECT_THAT(error_of([&] { PluginHost host(prefix.program); }).text,
                AllOf(HasSubstr("CAPSTAN_PLUGIN_PATH"), HasSubstr("relative")));
  }
}

TEST(PluginHost, RecipeFoldersMustExist) {
  Prefix prefix;
  PluginHost host(prefix.program);
  EXPECT_EQ(error_of([&] { host.add_search_path("/nowhere/at/all"); }).fault, Fault::input);
  EXPECT_EQ(error_of([&] { host.add_search_path("plugins"); }).fault, Fault::input);
}

TEST(PluginHost, NamesNeverReachTheFileSystem) {
  Prefix prefix;
  fs::copy_file(library("good"), prefix.folder.path / "lib/capstan/tokenizer_outside.so");
  PluginHost host(prefix.program);
  using namespace std::string_literals;
  for (const std::string& name : std::initializer_list<std::string>{"..", ".", "", "~", "good\0.."s, "a\nb", "*", "%s%n"}) {
    const Caught caught = error_of([&] { host.schema("tokenizer", name, prefix.folder.path.string()); });
    EXPECT_EQ(caught.fault, Fault::input) << name;
  }
  for (const char* name : {"../outside", "/", "./", "/etc/passwd", "/dev/null", "..so", ".so"}) {
    const Caught caught = error_of([&] { host.schema("tokenizer", name, prefix.folder.path.string()); });
    EXPECT_THAT(caught.text, HasSubstr("cannot load tokenizer plugin from /")) << name;
    EXPECT_EQ(caught.fault, Fault::input);
  }
}

TEST(PluginHost, AmbiguousNamesAreErrorsThatNameBoth) {
  Prefix prefix;
  TempFolder other;
  const fs::path a = prefix.put("good"), b = other.path / "also_good.so";
  fs::copy_file(library("good"), b);
  PluginHost host(prefix.program);
  host.schema("tokenizer", "good", "");
  host.add_search_path(other.path.string());
  const Caught caught = error_of([&] { host.schema("tokenizer", "good", ""); });
  EXPECT_EQ(caught.fault, Fault::input);
  EXPECT_THAT(caught.text, AllOf(HasSubstr("ambiguous"), HasSubstr(a.string()), HasSubstr(b.string())));
  // Naming one by its path settles it.
  PluginHost second(prefix.program);
  second.add_search_path(other.path.string());
  EXPECT_EQ(second.schema("tokenizer", b.string(), "").options().size(), 1u);
}

TEST(PluginHost, OneFileByTwoWaysIsOnePlugin) {
  Prefix prefix;
  TempFolder other;
  prefix.put("good");
  fs::create_symlink(prefix.plugins / "good.so", other.path / "link.so");
  fs::create_hard_link(prefix.plugins / "good.so", other.path / "hard.so");
  PluginHost host(prefix.program);
  host.add_search_path(other.path.string());
  EXPECT_EQ(host.files().size(), 1u);
  EXPECT_EQ(host.schema("tokenizer", "good", "").options().size(), 1u);
  host.schema("tokenizer", (other.path / "link.so").string(), "");
  EXPECT_EQ(host.loaded().size(), 1u);
}

TEST(PluginHost, UnknownNamesListWhatThereIs) {
  Prefix prefix;
  prefix.put("good");
  prefix.put("throws");
  PluginHost host(prefix.program);
  const Caught caught = error_of([&] { host.schema("tokenizer", "godo", ""); });
  EXPECT_EQ(caught.fault, Fault::input);
  EXPECT_THAT(caught.text, AllOf(HasSubstr("no tokenizer plugin 'godo'"), HasSubstr("did you mean 'good'?"),
                                 HasSubstr("good, throws"), HasSubstr(prefix.plugins.string())));
  EXPECT_THAT(error_of([&] { host.schema("optimizer", "good", ""); }).text,
              AllOf(HasSubstr("none of kind optimizer"), HasSubstr("'good' exists as tokenizer")));
  EXPECT_THAT(error_of([&] { host.schema("optimiser", "adamw", ""); }).text, HasSubstr("did you mean 'optimizer'?"));
}

}  // namespace
}  // namespace capstan::plugin_test
