// `capstan plugin list|info|new`, run as a person runs them.
#include "core/plugin/helpers.h"
#include "plugin/plugin_file.h"

#include <gmock/gmock.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cstdio>

namespace capstan::plugin_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

struct Outcome {
  int code = -1;
  std::string text;  // stdout and stderr
};

/// Runs the program with `words` (shell words) in `folder`.
Outcome run(const std::string& words, const fs::path& folder, const std::string& environment = "",
            const std::string& program = CAPSTAN_PROGRAM) {
  const std::string command = "cd '" + folder.string() + "' && " + environment + " '" + program + "' plugin " + words + " 2>&1";
  Outcome result;
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run " + command);
  std::array<char, 4096> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) result.text.append(buffer.data(), n);
  const int status = ::pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
  return result;
}

TEST(PluginList, ShowsWhatIsThereAndWhatIsRefused) {
  TempFolder folder;
  fs::copy_file(library("good"), folder.path / "a.so");
  write_bytes(folder.path / "b.so", with_info("no_register", [](PluginInfo& i) { i.core_epoch += 1; }));
  write_bytes(folder.path / "c.so", "no library at all");
  const Outcome all = run("list --plugin-path .", folder.path);
  EXPECT_EQ(all.code, 0) << all.text;
  EXPECT_THAT(all.text, AllOf(HasSubstr((folder.path / "a.so").string()), HasSubstr("1.2.3"),
                              HasSubstr("refused: core epoch " + std::to_string(core_epoch + 1)),
                              HasSubstr("refused: not a shared library"), HasSubstr("gpt"), HasSubstr("adamw")));
  const Outcome tokenizers = run("list --kind tokenizer --plugin-path " + folder.path.string(), "/");
  EXPECT_THAT(tokenizers.text, AllOf(HasSubstr("byte"), HasSubstr("good"), Not(HasSubstr("adamw"))));
}

TEST(PluginList, ShowsAmbiguousNames) {
  TempFolder folder;
  fs::copy_file(library("good"), folder.path / "a.so");
  fs::copy_file(library("good"), folder.path / "b.so");
  EXPECT_THAT(run("list --plugin-path .", folder.path).text, HasSubstr("ambiguous"));
}

TEST(PluginList, RunsNoCodeOfPlugins) {
  TempFolder folder;
  fs::create_directory(folder.path / "plugins");
  fs::copy_file(library("runs_on_load"), folder.path / "plugins/x.so");
  const fs::path mark = folder.path / "mark";
  const std::string environment = "CAPSTAN_TEST_MARK='" + mark.string() + "'";
  const Outcome list = run("list --plugin-path plugins", folder.path, environment);
  EXPECT_THAT(list.text, HasSubstr("runs_on_load"));
  EXPECT_FALSE(fs::exists(mark));
  // info has to load it: the mark does show when code runs.
  const Outcome info = run("info plugins/x.so", folder.path, environment);
  EXPECT_EQ(info.code, 0) << info.text;
  EXPECT_TRUE(fs::exists(mark));
}

TEST(PluginInfoCommand, PrintsOptionsByNameOrFile) {
  TempFolder folder;
  fs::copy_file(library("runs_on_load"), folder.path / "x.so");
  for (const std::string words : {"info ./x.so", "info x.so", "info runs_on_load --plugin-path .",
                                  "info runs_on_load --kind tokenizer --plugin-path ."}) {
    const Outcome r = run(words, folder.path);
    EXPECT_EQ(r.code, 0) << r.text;
    EXPECT_THAT(r.text, AllOf(HasSubstr("tokenizer plugin 'runs_on_load' 1.0.0"), HasSubstr("pieces"),
                              HasSubstr("how many pieces"), HasSubstr((folder.path / "x.so").string())))
        << words;
  }
}

TEST(PluginInfoCommand, SaysWhatIsWrong) {
  TempFolder folder;
  write_bytes(folder.path / "x.so", "no library at all");
  const struct {
    const char* words;
    const char* text;
  } cases[] = {
      {"info adamv", "did you mean 'adamw'?"},
      {"info adamw --kind tokenizer", "'adamw' exists as optimizer"},
      {"info ./x.so", "shorter than an ELF header"},
      {"info ./y.so", "No such file"},
      {"info gpt --plugin-path nowhere", "is no folder"},
      {"list --kind optimiser", "optimiser"},
  };
  for (const auto& c : cases) {
    const Outcome r = run(c.words, folder.path);
    EXPECT_EQ(r.code, 2) << c.words;
    EXPECT_THAT(r.text, HasSubstr(c.text));
  }
}

TEST(PluginNew, WritesAStart) {
  for (const std::string_view each : plugin_kinds) {
    const std::string kind(each);
    TempFolder folder;
    const Outcome r = run("new my_thing --kind " + kind, folder.path);
    EXPECT_EQ(r.code, 0) << r.text;
    const fs::path made = folder.path / "my_thing";
    for (const char* file : {"CMakeLists.txt", "my_thing.cpp", "recipe.yaml", "README.md"}) {
      ASSERT_TRUE(fs::exists(made / file)) << file;
      EXPECT_THAT(read_bytes(made / file), AllOf(HasSubstr("my_thing"), Not(HasSubstr("@name@")), Not(HasSubstr("@Name@")), Not(HasSubstr("@kind@"))));
    }
    EXPECT_EQ(std::distance(fs::directory_iterator(made), {}), 4);
    EXPECT_THAT(read_bytes(made / "recipe.yaml"), HasSubstr("\nrun:\n  dir: runs/my_thing\n"));  // not that of another start
    EXPECT_THAT(read_bytes(made / "CMakeLists.txt"), HasSubstr("capstan_add_plugin(my_thing KIND " + kind + " SOURCES my_thing.cpp)"));
    const std::string source = read_bytes(made / "my_thing.cpp");
    EXPECT_THAT(source, AllOf(HasSubstr("CAPSTAN_PLUGIN(\"" + kind + "\", \"my_thing\""), HasSubstr("class MyThing")));
    EXPECT_LT(std::count(source.begin(), source.end(), '\n'), kind == "inference" || kind == "checkpoint" ? 180 : 100);
  }
}

TEST(PluginNew, NamesTheKindsThatHaveATemplate) {
  TempFolder folder;
  // A program whose templates are of two kinds only, beside a file that is of no kind.
  fs::create_directories(folder.path / "bin");
  fs::copy_file(CAPSTAN_PROGRAM, folder.path / "bin/capstan");
  const fs::path templates = folder.path / "share/capstan/templates/plugin";
  write_bytes(templates / "CMakeLists.txt", "project(@name@)");
  write_bytes(templates / "model/@name@.cpp", "");
  write_bytes(templates / "layer/@name@.cpp", "");
  const Outcome r = run("new my_thing --kind optimizer", folder.path, "", folder.path / "bin/capstan");
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.text, HasSubstr("no template for kind 'optimizer'; there are: layer, model\n"));
  EXPECT_FALSE(fs::exists(folder.path / "my_thing"));
}

TEST(PluginNew, OverwritesNothing) {
  TempFolder folder;
  write_bytes(folder.path / "my_thing/precious.txt", "mine");
  const Outcome r = run("new my_thing --kind model", folder.path);
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.text, HasSubstr("nothing was written"));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path / "my_thing"), {}), 1);
  EXPECT_EQ(run("new my_thing --kind model --dir elsewhere/deep", folder.path).code, 0);
  EXPECT_TRUE(fs::exists(folder.path / "elsewhere/deep/my_thing.cpp"));
}

TEST(PluginNew, RefusesNamesThatAreNone) {
  TempFolder folder;
  for (const char* name : {"../x", "My", "9lives", "a-b", "a/b", "''", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}) {
    EXPECT_EQ(run("new " + std::string(name) + " --kind model", folder.path).code, 2) << name;
  }
  EXPECT_EQ(run("new x --kind optimiser", folder.path).code, 2);
  EXPECT_TRUE(fs::is_empty(folder.path));
}

}  // namespace
}  // namespace capstan::plugin_test
