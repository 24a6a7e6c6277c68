// Recipes from files: plugin choices, extends, overrides, paths, origins, and every refusal with its place.
#include "recipe_fixture.h"

namespace capstan::testing {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST_F(RecipeTest, MinimalRecipeGetsAllDefaults) {
  const Recipe recipe = load(write("r.yaml", minimal()));
  const Options& o = recipe.options;
  EXPECT_EQ(o.plugin("model").name, "gpt");
  EXPECT_EQ(o.plugin("model").kind, "model");
  EXPECT_EQ(o.plugin("model").options.integer("layers"), 2);
  EXPECT_EQ(o.plugin("optimizer").name, "adamw");
  EXPECT_EQ(o.plugin("optimizer").options.number("lr"), 3e-4);
  EXPECT_EQ(o.group("checkpoint").plugin("format").name, "hdf5");
  EXPECT_EQ(o.group("run").integer("seed"), 1);
  EXPECT_EQ(o.where("model"), recipe.path + ":1, model");
  EXPECT_EQ(o.plugin("model").options.where("layers"), recipe.path + ":1, model.layers");
  EXPECT_EQ(o.plugin("optimizer").options.where("lr"), "optimizer.lr (default)");
  EXPECT_EQ(o.group("data").where("batch_size"), recipe.path + ":5, data.batch_size");
  EXPECT_THAT(recipe.files, ElementsAre(recipe.path));
}

TEST_F(RecipeTest, PluginChoicesInAllForms) {
  EXPECT_EQ(load(write("a.yaml", minimal("optimizer: sgd\n"))).options.plugin("optimizer").name, "sgd");
  const auto b = load(write("b.yaml", minimal("optimizer: {plugin: sgd, lr: 2}\n"))).options;
  EXPECT_EQ(b.plugin("optimizer").options.number("lr"), 2);
  EXPECT_EQ(b.plugin("optimizer").options.number("momentum"), 0.9);
  const auto c = load(write("c.yaml", minimal("optimizer: {lr: 5e-4}\n"))).options;  // the default plugin's option
  EXPECT_EQ(c.plugin("optimizer").name, "adamw");
  EXPECT_EQ(c.plugin("optimizer").options.number("lr"), 5e-4);
  EXPECT_EQ(c.where("optimizer"), "optimizer (default)");
  const auto d = load(write("d.yaml", minimal("optimizer: {plugin: muon, others: {plugin: sgd, lr: 3}}\n"))).options;
  EXPECT_EQ(d.plugin("optimizer").options.plugin("others").options.number("lr"), 3);
  const std::string hybrid = minimal().substr(minimal().find('\n') + 1);
  const auto e =
      load(write("e.yaml", "model:\n  plugin: hybrid\n  pattern: [identity, {plugin: attention, heads: 2}]\n" + hybrid));
  const auto& pattern = e.options.plugin("model").options.plugins("pattern");
  ASSERT_EQ(pattern.size(), 2U);
  EXPECT_EQ(pattern[0].name, "identity");
  EXPECT_EQ(pattern[1].kind, "layer");
  EXPECT_EQ(pattern[1].options.integer("heads"), 2);
  EXPECT_EQ(pattern[1].options.where("heads"), e.path + ":3, model.pattern.1.heads");
}

TEST_F(RecipeTest, BadPluginChoices) {
  const auto wrong = [&](const std::string& more) { return refusal(write("r.yaml", minimal(more))); };
  EXPECT_THAT(wrong("optimizer: adamv\n"),
              AllOf(HasSubstr("r.yaml:7, optimizer] "), HasSubstr("no optimizer plugin 'adamv'")));
  EXPECT_THAT(wrong("optimizer: [adamw]\n"), HasSubstr("expected the name of a plugin of kind optimizer"));
  EXPECT_THAT(wrong("optimizer:\n"), HasSubstr("r.yaml:7, optimizer]"));
  EXPECT_THAT(wrong("optimizer: {plugin: }\n"), HasSubstr("got nothing"));
  EXPECT_THAT(wrong("optimizer: {plugin: [a]}\n"), HasSubstr("got a list"));
  EXPECT_THAT(wrong("optimizer: {plugin: \"\"}\n"), HasSubstr("expected the name"));
  EXPECT_THAT(wrong("optimizer:\n  plugin: adamw\n  lrr: 1\n"),
              AllOf(HasSubstr("r.yaml:9, optimizer] unknown key 'lrr' in optimizer (adamw); did you mean 'lr'?"),
                    HasSubstr("known: lr, betas, weight_decay")));
  EXPECT_THAT(refusal(write("n.yaml", "data: {sets: [], sequence_length: 1, batch_size: 1}\ntrain: {steps: 1}\n")),
              HasSubstr("n.yaml:1, model] missing; expected the name of a plugin of kind model"));
  EXPECT_THAT(refusal(write("m.yaml", "model: {layers: 3}\n")), HasSubstr("no plugin is named; expected 'plugin: NAME'"));
}

TEST_F(RecipeTest, TheIssueExample) {
  const std::string text = refusal(write("r.yaml",
                                         "model:\n  plugin: gpt\n  layerz: 6\ndata:\n  sets: [{path: d}]\n"
                                         "  sequence_length: 8\n  batch_size: 1\ntrain: {steps: 1}\n"));
  EXPECT_THAT(
      text, AllOf(HasSubstr("r.yaml:3, model] unknown key 'layerz' in model (gpt); did you mean 'layers'? known: layers, "),
                  HasSubstr("r.yaml:2, model.layers] missing")));
}

TEST_F(RecipeTest, PathsAreRelativeToTheirFile) {
  write("base/base.yaml", minimal());
  const auto o = load(write("top/r.yaml", "extends: ../base/base.yaml\nrun: {dir: out}\n")).options;
  EXPECT_EQ(o.group("data").groups("sets")[0].path("path"), folder + "/base/data/set");
  EXPECT_EQ(o.group("run").path("dir"), folder + "/top/out");
  const std::string cwd = std::filesystem::current_path().string();
  const auto c =
      load(folder + "/top/r.yaml", {"run.dir=here", "data.sets.0.path=/abs/../x", "data.sets.0.text=[a/*.txt, /b]"}).options;
  EXPECT_EQ(c.group("run").path("dir"), cwd + "/here");
  EXPECT_EQ(c.group("data").groups("sets")[0].path("path"), "/x");
  EXPECT_THAT(c.group("data").groups("sets")[0].paths("text"), ElementsAre(cwd + "/a/*.txt", "/b"));
  EXPECT_THAT(refusal(write("h.yaml", minimal("run: {dir: ~/x}\n"))),
              HasSubstr("h.yaml:7, run.dir] '~/x': ~ is not expanded"));
}

TEST_F(RecipeTest, PluginPathComesFirstAndPathsOfLibrariesResolve) {
  source.schemas[{"optimizer", folder + "/lib/mine.so"}] = source.schemas[{"optimizer", "sgd"}];
  const FakeSource prepared = source;
  const std::string path =
      write("sub/r.yaml", minimal("plugin_path: [plugins, /opt/p]\noptimizer: {plugin: ../lib/mine.so, lr: 4}\n"));
  FakeSource own = prepared;
  const Recipe recipe = load_recipe(path, {}, run_schema(), own);
  EXPECT_THAT(own.folders, ElementsAre(folder + "/sub/plugins", "/opt/p"));
  EXPECT_EQ(recipe.options.plugin("optimizer").name, folder + "/lib/mine.so");
  EXPECT_THAT(own.asked_from, Contains(folder + "/sub"));
  FakeSource other = prepared;
  load_recipe(path, {"plugin_path=[/q]"}, run_schema(), other);
  EXPECT_THAT(other.folders, ElementsAre("/q"));
  FakeSource third = prepared;
  load_recipe(path, {"plugin_path.1=/z"}, run_schema(), third);
  EXPECT_THAT(third.folders, ElementsAre(folder + "/sub/plugins", "/z"));
  EXPECT_THAT(refusal(write("bad.yaml", minimal("plugin_path: here\n"))),
              HasSubstr("plugin_path] expected a list of paths"));
}

TEST_F(RecipeTest, ExtendsMergesMapsAndReplacesListsAndScalars) {
  write("a.yaml",
        minimal("optimizer: {plugin: adamw, lr: 1e-3, betas: [0.8, 0.9]}\nschedule: {warmup: 5, decay: linear}\n"));
  write("b.yaml", "extends: a.yaml\noptimizer: {lr: 2e-3}\nschedule: {warmup: 6}\n");
  const Recipe recipe = load(write("c.yaml", "extends: b.yaml\noptimizer: {betas: [0.5]}\ndata: {sets: [{path: other}]}\n"));
  const Options& o = recipe.options;
  EXPECT_EQ(o.plugin("optimizer").options.number("lr"), 2e-3);
  EXPECT_THAT(o.plugin("optimizer").options.numbers("betas"), ElementsAre(0.5));
  EXPECT_EQ(o.group("schedule").integer("warmup"), 6);
  EXPECT_EQ(o.group("schedule").text("decay"), "linear");
  EXPECT_EQ(o.group("data").groups("sets").size(), 1U);
  EXPECT_EQ(o.group("data").groups("sets")[0].path("path"), folder + "/other");
  EXPECT_EQ(o.group("data").integer("batch_size"), 4);
  EXPECT_EQ(o.plugin("optimizer").options.where("lr"), folder + "/b.yaml:2, optimizer.lr");
  EXPECT_EQ(o.where("optimizer"), folder + "/a.yaml:7, optimizer");
  EXPECT_EQ(o.group("data").where("batch_size"), folder + "/a.yaml:5, data.batch_size");
  EXPECT_THAT(recipe.files, ElementsAre(folder + "/a.yaml", folder + "/b.yaml", folder + "/c.yaml"));
}

TEST_F(RecipeTest, AnotherPluginDropsTheOptionsOfTheBase) {
  write("a.yaml", minimal("optimizer: {plugin: adamw, lr: 1e-3, weight_decay: 0}\n"));
  const auto lr = [&](const std::string& over) {
    const auto o = load(write("b.yaml", "extends: a.yaml\n" + over)).options;
    return o.plugin("optimizer").options.number("lr");
  };
  EXPECT_EQ(lr("optimizer: {plugin: sgd}\n"), 0.1);  // another plugin: its own default
  EXPECT_EQ(lr("optimizer: sgd\n"), 0.1);
  EXPECT_EQ(lr("optimizer: adamw\n"), 1e-3);  // the same plugin, however written: kept
  EXPECT_EQ(lr("optimizer: {plugin: adamw}\n"), 1e-3);
  EXPECT_EQ(lr("optimizer: {weight_decay: 0.2}\n"), 1e-3);
  // A base that relies on the default plugin is one of adamw all the same.
  write("a.yaml", minimal("optimizer: {lr: 1e-3, weight_decay: 0}\n"));
  EXPECT_EQ(lr("optimizer: {plugin: sgd}\n"), 0.1);
  EXPECT_EQ(lr("optimizer: {plugin: adamw}\n"), 1e-3);
  write("a.yaml", minimal("optimizer: sgd\n"));
  EXPECT_EQ(lr("optimizer: {lr: 7}\n"), 7);
  // One level further down, too.
  write("a.yaml", minimal("optimizer: {plugin: muon, others: {lr: 9}}\n"));
  const auto o = load(write("b.yaml", "extends: a.yaml\noptimizer: {others: sgd}\n")).options;
  EXPECT_EQ(o.plugin("optimizer").options.plugin("others").options.number("lr"), 0.1);
}

TEST_F(RecipeTest, BadExtends) {
  const auto wrong = [&](const std::string& text) { return refusal(write("r.yaml", text)); };
  EXPECT_THAT(wrong("model: gpt\nextends: none.yaml\n"),
              AllOf(HasSubstr("r.yaml:2, extends] there is no file"), HasSubstr("none.yaml")));
  EXPECT_THAT(wrong("extends: [a.yaml]\n"), HasSubstr("extends] expected the path of one recipe file, got a list"));
  EXPECT_THAT(wrong("extends:\n"), HasSubstr("got nothing"));
  EXPECT_THAT(wrong("extends: r.yaml\n"), HasSubstr("r.yaml:1, extends] a circle:"));
  EXPECT_THAT(wrong("extends: ./x/../r.yaml\n"), AllOf(HasSubstr("r.yaml:1, extends]")));
  write("b.yaml", "extends: c.yaml\n");
  write("c.yaml", "\nextends: b.yaml\n");
  EXPECT_THAT(wrong("extends: b.yaml\n"), AllOf(HasSubstr("c.yaml:2, extends] a circle:"), HasSubstr("r.yaml -> "),
                                                HasSubstr("b.yaml -> "), HasSubstr("cannot extend itself")));
  std::filesystem::create_symlink(folder + "/s.yaml", folder + "/link.yaml");
  EXPECT_THAT(refusal(write("s.yaml", "extends: link.yaml\n")), HasSubstr("a circle"));
  for (int i = 0; i < 20; ++i) write("n" + std::to_string(i) + ".yaml", "extends: n" + std::to_string(i + 1) + ".yaml\n");
  EXPECT_THAT(refusal(folder + "/n0.yaml"), HasSubstr("more than 16 recipes"));
  write("broken.yaml", "a: [1\n");
  EXPECT_THAT(wrong("extends: broken.yaml\n"), AllOf(HasSubstr("broken.yaml:"), HasSubstr("not YAML")));
}

TEST_F(RecipeTest, FaultsOfABaseNameTheBase) {
  write("base.yaml", minimal("schedule:\n  warmup: many\n"));
  EXPECT_THAT(refusal(write("r.yaml", "extends: base.yaml\n")),
              HasSubstr("base.yaml:8, schedule.warmup] expected an integer, got 'many'"));
  EXPECT_NO_THROW(load(write("r.yaml", "extends: base.yaml\nschedule: {warmup: 3}\n")));
}

TEST_F(RecipeTest, Overrides) {
  const std::string path = write("r.yaml", minimal());
  const auto o =
      load(path, {"train.steps=1e3", "run.seed=7", "optimizer.lr=5e-3", "data.sets.0.weight=2.5", "model.norm=layer",
                  "train.sample_prompt=#include <a>: b", "optimizer.betas=[0.1, 0.2]", "schedule={warmup: 3}"})
          .options;
  EXPECT_EQ(o.group("train").integer("steps"), 1000);
  EXPECT_EQ(o.group("run").integer("seed"), 7);
  EXPECT_EQ(o.plugin("optimizer").options.number("lr"), 5e-3);
  EXPECT_EQ(o.group("data").groups("sets")[0].number("weight"), 2.5);
  EXPECT_EQ(o.plugin("model").options.integer("layers"), 2);
  EXPECT_EQ(o.plugin("model").options.text("norm"), "layer");
  EXPECT_EQ(o.group("train").text("sample_prompt"), "#include <a>: b");
  EXPECT_THAT(o.plugin("optimizer").options.numbers("betas"), ElementsAre(0.1, 0.2));
  EXPECT_EQ(o.group("schedule").integer("warmup"), 3);
  EXPECT_EQ(o.group("train").where("steps"), "command line, train.steps");
  EXPECT_EQ(o.where("model"), path + ":1, model");
  EXPECT_EQ(load(path, {"run.seed=1", "run.seed=2"}).options.group("run").integer("seed"), 2);
  EXPECT_EQ(load(path, {"run.dir="}).options.group("run").path("dir"), "");
}

TEST_F(RecipeTest, OverridesOfPluginsDoNotDependOnTheirOrder) {
  const std::string path = write("r.yaml", minimal("optimizer: {plugin: adamw, lr: 1e-3, weight_decay: 0}\n"));
  for (const auto& words : std::vector<std::vector<std::string>>{{"optimizer=sgd", "optimizer.lr=3"},
                                                                 {"optimizer.lr=3", "optimizer=sgd"},
                                                                 {"optimizer.lr=3", "optimizer.plugin=sgd"}}) {
    const auto o = load(path, words).options;
    EXPECT_EQ(o.plugin("optimizer").name, "sgd");
    EXPECT_EQ(o.plugin("optimizer").options.number("lr"), 3);
  }
  EXPECT_EQ(load(path, {"optimizer=adamw"}).options.plugin("optimizer").options.number("lr"), 1e-3);
  const std::string shorthand = write("s.yaml", minimal("optimizer: sgd\n"));
  EXPECT_EQ(load(shorthand, {"optimizer.momentum=0.5"}).options.plugin("optimizer").options.number("momentum"), 0.5);
}

TEST_F(RecipeTest, BadOverrides) {
  const std::string path = write("r.yaml", minimal());
  const auto wrong = [&](const std::string& word) { return refusal(path, {word}); };
  EXPECT_THAT(wrong("train.steps"),
              AllOf(StartsWith("[command line] 'train.steps' is no override"), HasSubstr("expected key.path=value")));
  EXPECT_THAT(wrong("=3"), HasSubstr("is no override"));
  EXPECT_THAT(wrong("train..steps=3"), HasSubstr("empty part"));
  EXPECT_THAT(wrong("train.=3"), HasSubstr("empty part"));
  EXPECT_THAT(wrong(".train=3"), HasSubstr("empty part"));
  EXPECT_THAT(wrong("train.stepz=3"),
              StartsWith("[command line, train] unknown key 'stepz' in train; did you mean 'steps'?"));
  EXPECT_THAT(wrong("tran.steps=3"), StartsWith("[command line] unknown key 'tran'; did you mean 'train'?"));
  EXPECT_THAT(wrong("model.layerz=3"),
              StartsWith("[command line, model] unknown key 'layerz' in model (gpt); did you mean 'layers'?"));
  EXPECT_THAT(wrong("train.steps=many"), StartsWith("[command line, train.steps] expected an integer, got 'many'"));
  EXPECT_THAT(wrong("train.steps=0"), StartsWith("[command line, train.steps] out of range"));
  EXPECT_THAT(wrong("train.steps.deep=1"), HasSubstr("train.steps] expected an integer, got a map"));
  EXPECT_THAT(wrong("train=5"), HasSubstr("[command line, train] expected a map"));
  EXPECT_THAT(
      wrong("data.sets.3.path=x"),
      AllOf(StartsWith("[command line, data.sets.3.path] there is no element 3: data.sets holds 1, counted from 0")));
  EXPECT_THAT(wrong("data.sets.99999999999999999999.path=x"), HasSubstr("data.sets holds 1"));
  EXPECT_THAT(wrong("optimizer.betas.0=0.5"),
              HasSubstr("the recipe gives no list 'optimizer.betas' to index; give all of it: optimizer.betas=[...]"));
  EXPECT_THAT(wrong("data.sets.path=x"), HasSubstr("[command line, data.sets] expected a list of maps, got a map"));
  EXPECT_THAT(wrong("0=x"), HasSubstr("starts with a name"));
  EXPECT_THAT(wrong("extends=a.yaml"), HasSubstr("in its file only"));
  EXPECT_THAT(wrong("data.sets=[{path: x"), AllOf(StartsWith("[command line, 'data.sets'"), HasSubstr("not YAML")));
  EXPECT_THAT(wrong("train.sample_prompt=\xFF"), HasSubstr("not UTF-8"));
  std::string deep = "a";
  for (int i = 0; i < 1000; ++i) deep += ".a";
  EXPECT_THAT(wrong(deep + "=1"), HasSubstr("too deep"));
}

TEST_F(RecipeTest, ErrorsOfASourceThatAreNotTheUsersPassThrough) {
  class Broken : public FakeSource {
   public:
    const Schema& schema(std::string_view, std::string_view, const std::string&) override {
      fail(Fault::runtime, "disk", "gone");
    }
  } broken;
  const std::string path = write("r.yaml", minimal());
  EXPECT_EQ(error_of(Fault::runtime, [&] { load_recipe(path, {}, run_schema(), broken); }), "[disk] gone");
  class NoFolder : public FakeSource {
   public:
    void add_search_path(const std::string& f) override { fail(Fault::input, "plugin_path", "'" + f + "' is no folder"); }
  } no_folder;
  const std::string bad = write("p.yaml", minimal("plugin_path: [/none]\n"));
  EXPECT_THAT(error_of(Fault::input, [&] { load_recipe(bad, {}, run_schema(), no_folder); }),
              HasSubstr("p.yaml:7, plugin_path] "));
}

TEST_F(RecipeTest, RecipesCutAnywhereNeverCrash) {
  const std::string whole = minimal("optimizer: {plugin: muon, lr: 0.1, others: {plugin: sgd}}\nschedule:\n  decay: wsd\n");
  for (std::size_t n = 0; n < whole.size(); ++n) {
    for (const char* tail : {"", "\x01", "]", ": x", " *a", "\n- b"}) {
      const std::string path = write("cut.yaml", whole.substr(0, n) + tail);
      try {
        load(path);
      } catch (const Error& e) {
        ASSERT_EQ(e.fault(), Fault::input) << e.what();
        ASSERT_THAT(e.what(), HasSubstr("cut.yaml")) << whole.substr(0, n) + tail;
      }
    }
  }
}

}  // namespace
}  // namespace capstan::testing
