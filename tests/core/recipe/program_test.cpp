// The program's recipe commands with the real plugins, and that the recipes people copy are right.
#include "plugin/host.h"
#include "recipe_fixture.h"

#include <sys/wait.h>

#include <array>
#include <cstdio>

namespace capstan::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class RecipeProgram : public RecipeTest {
 protected:
  struct Outcome {
    int exit_code;
    std::string text;  ///< stdout and stderr
  };

  Outcome run(const std::string& words) const {
    const std::string command = "cd '" + folder + "' && '" CAPSTAN_PROGRAM "' " + words + " 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    Outcome outcome{-1, ""};
    if (pipe == nullptr) return outcome;
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) outcome.text.append(buffer.data(), n);
    const int status = ::pclose(pipe);
    if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
    return outcome;
  }

  /// One that the plugins of this tree accept.
  std::string real_recipe() const {
    return write("r.yaml",
                 "model: {plugin: gpt, layers: 1, heads: 2, width: 16}\ndata:\n  sets: [{path: d}]\n"
                 "  sequence_length: 8\n  batch_size: 2\ntrain: {steps: 3}\n");
  }
};

TEST_F(RecipeProgram, EveryRecipeOfThisTreeIsAccepted) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(CAPSTAN_SOURCE_DIR "/recipes")) {
    if (entry.path().extension() != ".yaml") continue;
    ++count;
    PluginHost host(CAPSTAN_PROGRAM);
    const Recipe recipe = load_recipe(entry.path().string(), {}, run_schema(), host);
    EXPECT_NO_THROW(check_run_options(recipe.options)) << entry.path();
    // What a run stores of it is the same recipe.
    PluginHost again(CAPSTAN_PROGRAM);
    const std::string stored = write("stored.yaml", to_yaml(recipe));
    EXPECT_EQ(to_yaml(load_recipe(stored, {}, run_schema(), again)), to_yaml(recipe)) << entry.path();
    std::ifstream stream(entry.path());
    std::string first;
    std::getline(stream, first);
    EXPECT_THAT(first, ::testing::StartsWith("# ")) << entry.path() << " must open with what it is and needs";
  }
  EXPECT_GE(count, 3);
}

TEST_F(RecipeProgram, ShowPrintsValuesAndOrigins) {
  real_recipe();
  const Outcome shown = run("recipe show r.yaml train.steps=7");
  EXPECT_EQ(shown.exit_code, 0) << shown.text;
  EXPECT_THAT(shown.text, AllOf(::testing::ContainsRegex("  steps: 7 +# command line\n"),
                                ::testing::ContainsRegex("  layers: 1 +# r.yaml:1\n"),
                                ::testing::ContainsRegex("  plugin: adamw +# default\n")));
  const Outcome plain =
      run("recipe show --plain r.yaml > plain.yaml && '" CAPSTAN_PROGRAM "' recipe show --plain plain.yaml");
  EXPECT_EQ(plain.exit_code, 0) << plain.text;
  std::ifstream stream(folder + "/plain.yaml");
  EXPECT_EQ(plain.text, std::string(std::istreambuf_iterator<char>(stream), {}));
}

TEST_F(RecipeProgram, CheckSaysValidOrWhy) {
  real_recipe();
  const Outcome good = run("recipe check r.yaml");
  EXPECT_EQ(good.exit_code, 0) << good.text;
  EXPECT_THAT(good.text, AllOf(HasSubstr("r.yaml is valid"), HasSubstr("3 steps of 2 sequences x 8 tokens")));
  const Outcome unknown = run("recipe check r.yaml model.layerz=2");
  EXPECT_EQ(unknown.exit_code, 2) << unknown.text;
  EXPECT_THAT(unknown.text, HasSubstr("[command line, model] unknown key 'layerz' in model (gpt); did you mean 'layers'?"));
  const Outcome contradiction = run("recipe check r.yaml train.on_nonfinite=rollback");
  EXPECT_EQ(contradiction.exit_code, 2) << contradiction.text;
  EXPECT_EQ(run("recipe check none.yaml").exit_code, 2);
  EXPECT_EQ(run("recipe check").exit_code, 2);
  EXPECT_EQ(run("recipe frobnicate").exit_code, 2);
}

TEST_F(RecipeProgram, HelpAndKeys) {
  EXPECT_EQ(run("recipe check --help").exit_code, 0);
  EXPECT_THAT(run("recipe --help").text, AllOf(HasSubstr("show"), HasSubstr("check"), HasSubstr("keys")));
  const Outcome keys = run("recipe keys");
  EXPECT_EQ(keys.exit_code, 0);
  EXPECT_EQ(keys.text, help_text(run_schema()));
}

}  // namespace
}  // namespace capstan::testing
