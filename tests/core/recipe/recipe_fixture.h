// defines: RecipeTest: a folder for recipe files and a source of plugin schemas that needs no libraries.
#pragma once
#include "recipe/recipe.h"
#include "recipe/run_schema.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace capstan::testing {

/// Plugins by (kind, name); remembers what it was asked.
class FakeSource : public SchemaSource {
 public:
  FakeSource() {
    Schema adamw;
    adamw.number("lr", 3e-4, "peak learning rate").above(0);
    adamw.list(OptionSpec::Type::numbers, "betas", "[0.9, 0.95]", "decay of the moments").range(0, 1);
    adamw.number("weight_decay", 0.1, "decoupled decay").at_least(0);
    schemas[{"optimizer", "adamw"}] = adamw;

    Schema sgd;
    sgd.number("lr", 0.1, "learning rate").above(0);
    sgd.number("momentum", 0.9, "momentum").range(0, 1);
    schemas[{"optimizer", "sgd"}] = sgd;

    Schema muon;
    muon.number("lr", 0.02, "learning rate").above(0);
    muon.plugin("optimizer", "others", "adamw", "for what is no hidden matrix");
    schemas[{"optimizer", "muon"}] = muon;

    Schema gpt;
    gpt.required(OptionSpec::Type::integer, "layers", "number of blocks").at_least(1);
    gpt.integer("width", 64, "size of the residual stream").at_least(1);
    gpt.text("norm", "rms", "normalization").one_of({"rms", "layer"});
    gpt.flag("bias", false, "whether linear layers have biases");
    gpt.optional(OptionSpec::Type::number, "dropout", "share of activations dropped").range(0, 1);
    schemas[{"model", "gpt"}] = gpt;

    Schema hybrid;
    hybrid.plugins("layer", "pattern", "the blocks, first to last");
    schemas[{"model", "hybrid"}] = hybrid;
    Schema attention;
    attention.integer("heads", 4, "attention heads").at_least(1);
    schemas[{"layer", "attention"}] = attention;
    schemas[{"layer", "identity"}] = Schema{};

    schemas[{"tokenizer", "byte"}] = Schema{};
    schemas[{"inference", "basic"}] = Schema{};
    schemas[{"checkpoint", "hdf5"}] = Schema{};
  }

  void add_search_path(const std::string& folder) override {
    EXPECT_TRUE(asked.empty()) << "plugin_path must be known before the first plugin is asked for";
    folders.push_back(folder);
  }

  const Schema& schema(std::string_view kind, std::string_view name, const std::string& folder) override {
    asked.emplace_back(kind, name);
    asked_from.push_back(folder);
    const auto found = schemas.find({std::string(kind), std::string(name)});
    if (found == schemas.end())
      fail(Fault::input, "plugin", "no " + std::string(kind) + " plugin '" + std::string(name) + "'");
    return found->second;
  }

  std::map<std::pair<std::string, std::string>, Schema> schemas;
  std::vector<std::pair<std::string, std::string>> asked;
  std::vector<std::string> asked_from, folders;
};

class RecipeTest : public ::testing::Test {
 protected:
  RecipeTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "capstan_recipe_XXXXXX").string();
    folder = ::mkdtemp(pattern.data());
  }
  ~RecipeTest() override { std::filesystem::remove_all(folder); }

  /// Writes a file below the test's folder and returns its path.
  std::string write(const std::string& name, const std::string& text) const {
    const auto path = std::filesystem::path(folder) / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }

  /// A recipe with all that is required, and `more` at its end.
  static std::string minimal(const std::string& more = "") {
    return "model: {plugin: gpt, layers: 2}\n"  // line 1
           "data:\n"                            // 2
           "  sets: [{path: data/set}]\n"       // 3
           "  sequence_length: 16\n"            // 4
           "  batch_size: 4\n"                  // 5
           "train: {steps: 10}\n" +
           more;  // 6, then 7
  }

  Recipe load(const std::string& path, const std::vector<std::string>& overrides = {}) {
    FakeSource fresh;
    std::swap(fresh, source);
    return load_recipe(path, overrides, run_schema(), source);
  }

  /// The message of the Error(input) that loading must end in.
  std::string refusal(const std::string& path, const std::vector<std::string>& overrides = {}) {
    try {
      load(path, overrides);
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "the recipe was accepted";
    return "";
  }

  std::string folder;
  FakeSource source;
};

/// The message of the Error that `call` must throw, which must be of this fault.
template <class Call>
std::string error_of(Fault fault, Call call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), fault) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

}  // namespace capstan::testing
