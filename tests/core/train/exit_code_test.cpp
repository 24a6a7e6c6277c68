// What a person gets wrong ends the program with 2, before anything is made, and is named by its place.
#include "support.h"

#include <gmock/gmock.h>

namespace capstan::train::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(ExitCode, UnknownKeyIsTwo) {
  Project project;
  const Exit exit = train(project.recipe(), {"train.stepz=3"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("stepz"), HasSubstr("steps")));
  EXPECT_FALSE(fs::exists(project / "run"));
}

TEST(ExitCode, MissingDatasetIsTwo) {
  Project project;
  const Exit exit = train(project.recipe(), {"data.sets=[{path: " + (project / "nowhere").string() + "}]"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr((project / "nowhere.idx").string()), HasSubstr("capstan data build")));
}

TEST(ExitCode, UnknownPluginIsTwo) {
  Project project;
  const Exit exit = train(project.recipe(), {"optimizer={plugin: adamv}"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("adamv"), HasSubstr("adamw")));
}

TEST(ExitCode, ContextShorterThanTheSequencesIsTwo) {
  Project project;
  const Exit exit = train(project.recipe(), {"data.sequence_length=64"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("data.sequence_length"), HasSubstr("32 tokens")));
  EXPECT_FALSE(fs::exists(project / "run"));
  EXPECT_FALSE(built_data(project));
}

TEST(ExitCode, AMicrobatchOfTooManyRowsIsTwoForTrainAndForCheck) {
  Project project;
  const std::vector<std::string> words{"model.context=128", "data.sequence_length=128", "data.batch_size=16777216"};
  const auto refused = [&](std::vector<std::string> command, const std::vector<std::string>& more, const std::string& what) {
    command.push_back(project.recipe());
    command.insert(command.end(), words.begin(), words.end());
    command.insert(command.end(), more.begin(), more.end());
    const Exit exit = Child(command).wait();
    EXPECT_EQ(exit.code, 2) << exit.out;
    EXPECT_THAT(exit.err, AllOf(HasSubstr(what), HasSubstr("more than 2^31 - 1 rows"), HasSubstr("16777216 samples of 128 tokens")));
    EXPECT_THAT(exit.out, Not(HasSubstr("is valid")));
  };
  for (const char* first : {"train", "recipe"}) {
    const std::vector<std::string> command = *first == 't' ? std::vector<std::string>{"train"} : std::vector<std::string>{"recipe", "check"};
    refused(command, {"data.micro_batch=0"}, "[command line, data.batch_size]");
    refused(command, {"data.micro_batch=16777216"}, "[command line, data.micro_batch]");
  }
  EXPECT_FALSE(fs::exists(project / "run"));
  EXPECT_FALSE(built_data(project));
}

// What a key causes is said at its place, also where it comes out far from the recipe.
TEST(ExitCode, FaultsOfKeysAreTwoAndNameThem) {
  Project project;
  const auto refused = [&](const std::vector<std::string>& command, const std::vector<std::string>& more, const std::string& where, const std::string& what) {
    std::vector<std::string> words = command;
    words.push_back(project.recipe());
    words.insert(words.end(), more.begin(), more.end());
    const Exit exit = Child(words).wait();
    EXPECT_EQ(exit.code, 2) << exit.out;
    EXPECT_THAT(exit.err, AllOf(HasSubstr("[" + where + "] "), HasSubstr(what)));
    EXPECT_THAT(exit.out, Not(HasSubstr("is valid")));
  };
  const std::vector<std::string> training{"train"}, check{"recipe", "check"};
  for (const auto& command : {training, check}) {
    refused(command, {"model.vocabulary=100"}, "command line, model.vocabulary", "expected 257 tokens or more, got 100; 0 takes the tokenizer's");
    refused(command, {"model.heads=65536", "model.head_size=65536", "model.width=1048576"}, project.recipe() + ":1, model", "bytes: expected a smaller model");
  }
  refused({"recipe", "check", "--ranks", "2", "--device", "h200"}, {"model.heads=65536", "model.head_size=65536", "model.width=1048576"}, project.recipe() + ":1, model", "a smaller model");
  refused({"recipe", "check", "--ranks", "8"}, {"mesh.pp=8"}, "command line, mesh.pp", "the model has 4 calls, too few for 8 stages");
  refused({"recipe", "check", "--ranks", "4"}, {"mesh.pp=4", "mesh.pipeline.schedule=interleaved", "mesh.pipeline.stages_per_rank=2"}, "command line, mesh.pipeline.stages_per_rank",
          "the model has 4 calls, too few for 8 stages");
  ASSERT_EQ(train(project.recipe(), {"train.steps=2"}).code, 0);
  refused(training, {"data.sequence_length=16"}, "command line, data.sequence_length", "expected 32, as its checkpoint has, got 16");
}

std::string set_of(const Project& project, const std::string& text) {
  return "data.sets=[{path: " + (project / "data/set").string() + ", text: [" + text + "]}]";
}

TEST(DataSets, BuiltFromOtherTextAreRefused) {
  Project project;
  write_file(project / "a/one.txt", some_text(60)), write_file(project / "b/two.txt", some_text(61));
  const std::string a = (project / "a").string(), b = (project / "b").string();
  const auto run = [&](const std::string& set, const std::string& name) { return train(project.recipe(), {set, "train.steps=1", project.dir(name), "data.validation=0", "train.validate_every=0"}); };
  ASSERT_EQ(run(set_of(project, a + ", " + b), "first").code, 0);
  const std::string built = read_file(project / "data/set.bin");
  // In another order, or not named at all, it is the same set.
  EXPECT_EQ(run(set_of(project, b + "/, " + a + "/../a"), "second").code, 0);
  EXPECT_EQ(run("data.sets=[{path: " + (project / "data/set").string() + "}]", "third").code, 0);
  const auto refused = [&](const std::string& set, const std::string& key, const std::string& what) {
    const Exit exit = run(set, "refused");
    EXPECT_EQ(exit.code, 2) << exit.out;
    EXPECT_THAT(exit.err, AllOf(HasSubstr("[command line, data.sets.0." + key + "]"), HasSubstr(what), HasSubstr("to build it again remove "), HasSubstr("another `path`")));
    EXPECT_FALSE(fs::exists(project / "refused"));
    const Exit check = Child({"recipe", "check", project.recipe(), set}).wait();
    EXPECT_THAT(check.out, AllOf(HasSubstr("a run is refused here: "), HasSubstr(what)));
  };
  refused(set_of(project, a), "text", "was built from other text: expected " + a + ", " + b + ", got " + a);
  refused(set_of(project, a + ", " + b + "/*.txt"), "text", "got " + a + ", " + b + "/*.txt");
  refused("data.sets=[{path: " + (project / "data/set").string() + ", text: [" + a + ", " + b + "], max_bytes: 500}]", "max_bytes", "expected 0, got 500");
  EXPECT_EQ(read_file(project / "data/set.bin"), built);
  // A set without a note, or with one of a program that did not write down inputs, is nobody's to judge.
  nlohmann::json note = nlohmann::json::parse(read_file(project / "data/set.json"));
  note.at("inputs").erase("named");
  write_file(project / "data/set.json", note.dump());
  EXPECT_EQ(run(set_of(project, a), "fourth").code, 0);
  fs::remove(project / "data/set.json");
  EXPECT_EQ(run(set_of(project, a), "fifth").code, 0);
}

TEST(DataSets, AtOnePathHaveOneText) {
  Project project;
  write_file(project / "a/one.txt", some_text(60)), write_file(project / "b/two.txt", some_text(61));
  const std::string a = (project / "a").string(), b = (project / "b").string(), path = "{path: " + (project / "data/set").string() + ", text: [";
  const auto run = [&](const std::string& sets) { return train(project.recipe(), {"data.sets=[" + sets + "]", "train.steps=1", project.dir("run"), "data.validation=0", "train.validate_every=0"}); };
  const auto refused = [&](const std::string& second, const std::string& key, const std::string& what) {
    const Exit exit = run(path + a + "]}, " + path + second);
    EXPECT_EQ(exit.code, 2) << exit.out;
    EXPECT_THAT(exit.err, AllOf(HasSubstr("[command line, data.sets.1." + key + "]"), HasSubstr(what), HasSubstr("another `path`")));
    EXPECT_FALSE(fs::exists(project / "data/set.idx")) << "refused before anything is built";
    EXPECT_FALSE(fs::exists(project / "run"));
  };
  refused(b + "]}", "text", "name different text: " + a + " and " + b);
  refused(a + "], max_bytes: 500}", "max_bytes", "name different limits: 0 and 500");
  EXPECT_EQ(run(path + a + "]}, " + path + a + "/../a]}").code, 0);
}

// Paths count as seen from the set too: a project that moved as a whole is what it was.
TEST(DataSets, MoveWithTheirText) {
  Project project;
  write_file(project / "here/a/one.txt", some_text(60));
  write_file(project / "here/recipe.yaml", read_file(project.recipe()));
  const auto run = [&](const std::string& folder, const std::string& name) {
    const std::string at = (project / folder).string();
    return train(at + "/recipe.yaml", {"data.sets=[{path: " + at + "/data/set, text: [" + at + "/a/*.txt]}]", "train.steps=1", project.dir(name), "data.validation=0", "train.validate_every=0"});
  };
  ASSERT_EQ(run("here", "first").code, 0);
  fs::rename(project / "here", project / "there");
  EXPECT_EQ(run("there", "second").code, 0);
  fs::create_directories(project / "there/c");
  fs::rename(project / "there/data", project / "there/c/data");
  const std::string at = (project / "there").string();
  EXPECT_EQ(train(at + "/recipe.yaml", {"data.sets=[{path: " + at + "/c/data/set, text: [" + at + "/a/*.txt]}]", "train.steps=1", project.dir("third")}).code, 2);
}

TEST(ExitCode, CheckpointOfAnotherModelIsTwoAndNamesTensors) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {}).code, 0);
  const auto before = weights(project / "run", 20);
  const Exit exit = train(project.recipe(), {"model.width=64"});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr("model/layers.0.attention.qkv.weight"), HasSubstr("[96, 32]"), HasSubstr("[192, 64]")));
  EXPECT_EQ(weights(project / "run", 20), before);
  EXPECT_THAT(read_file(project / "run/recipe.yaml"), HasSubstr("width: 32"));
  EXPECT_EQ(metrics_with(project / "run", "lr").size(), 20u);
  const Exit other = train(project.recipe(), {"optimizer={plugin: sgd}"});
  EXPECT_EQ(other.code, 2);
  EXPECT_THAT(other.err, HasSubstr("optimizer/"));
}

TEST(ExitCode, AFolderThatCannotBeMadeIsTwo) {
  Project project;
  write_file(project / "file", "");
  const Exit exit = train(project.recipe(), {project.dir("file/run")});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.err, AllOf(HasSubstr((project / "file/run").string()), HasSubstr("run.dir")));
}

}  // namespace
}  // namespace capstan::train::testing
