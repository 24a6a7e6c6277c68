// The keys that every run has, the contradictions between them, and that the documentation lists what the schema says.
#include "recipe_fixture.h"

#include <sstream>

namespace capstan::testing {
namespace {

using ::testing::HasSubstr;

class RunSchemaTest : public RecipeTest {
 protected:
  std::string contradiction(const std::string& more, const std::vector<std::string>& words = {}) {
    const Recipe recipe = load(write("r.yaml", minimal(more)), words);
    return error_of(Fault::input, [&] { check_run_options(recipe.options); });
  }
};

TEST_F(RunSchemaTest, DefaultsOfARun) {
  const Options o = load(write("r.yaml", minimal())).options;
  EXPECT_NO_THROW(check_run_options(o));
  EXPECT_EQ(o.group("run").path("dir"), "");
  EXPECT_EQ(o.group("run").text("resume"), "auto");
  EXPECT_EQ(o.group("run").integer("threads"), 0);
  EXPECT_EQ(o.group("run").text("device"), "cpu");
  EXPECT_EQ(o.group("run").text("attention_backward"), "ordered");
  EXPECT_EQ(o.group("precision").text("compute"), "f32");
  EXPECT_EQ(o.group("precision").text("linear"), "compute");
  EXPECT_EQ(o.group("precision").text("linear_gradient"), "e5m2");
  EXPECT_EQ(o.plugin("tokenizer").name, "byte");
  EXPECT_EQ(o.plugin("inference").name, "basic");
  const Options& data = o.group("data");
  EXPECT_EQ(data.integer("micro_batch"), 0);
  EXPECT_EQ(data.number("validation"), 0.01);
  EXPECT_FALSE(data.flag("attend_across_documents"));
  EXPECT_EQ(data.integer("prefetch"), 2);
  EXPECT_EQ(data.groups("sets")[0].number("weight"), 1);
  EXPECT_EQ(data.groups("sets")[0].integer("max_bytes"), 0);
  EXPECT_TRUE(data.groups("sets")[0].paths("text").empty());
  const Options& schedule = o.group("schedule");
  EXPECT_EQ(schedule.integer("warmup"), 0);
  EXPECT_EQ(schedule.text("decay"), "cosine");
  EXPECT_EQ(schedule.number("final"), 0.1);
  EXPECT_EQ(schedule.integer("decay_steps"), 0);
  EXPECT_EQ(schedule.text("decay_shape"), "linear");
  const Options& train = o.group("train");
  EXPECT_EQ(train.number("clip"), 1);
  EXPECT_EQ(train.integer("validate_every"), 0);
  EXPECT_EQ(train.integer("validate_batches"), 8);
  EXPECT_EQ(train.integer("sample_every"), 0);
  EXPECT_EQ(train.text("sample_prompt"), "");
  EXPECT_EQ(train.integer("sample_tokens"), 128);
  EXPECT_EQ(train.text("on_nonfinite"), "stop");
  EXPECT_EQ(train.number("spike_threshold"), 0);
  EXPECT_EQ(train.text("recompute"), "none");
  EXPECT_EQ(train.integer("log_every"), 1);
  const Options& checkpoint = o.group("checkpoint");
  EXPECT_EQ(checkpoint.integer("every_steps"), 0);
  EXPECT_EQ(checkpoint.number("every_minutes"), 0);
  EXPECT_EQ(checkpoint.integer("keep"), 3);
  EXPECT_TRUE(checkpoint.flag("asynchronous"));
  EXPECT_TRUE(checkpoint.flag("at_end"));
  EXPECT_EQ(checkpoint.text("on_damage"), "fallback");
}

TEST_F(RunSchemaTest, RequiredKeys) {
  const std::string text = refusal(write("r.yaml", "model: {plugin: gpt, layers: 1}\n"));
  for (const char* key : {"data.sets", "data.sequence_length", "data.batch_size", "train.steps"}) {
    EXPECT_THAT(text, HasSubstr(std::string("r.yaml:1, ") + key + "] missing"));
  }
}

TEST_F(RunSchemaTest, RangesAndWords) {
  const std::string path = write("r.yaml", minimal());
  for (const char* word :
       {"data.validation=0.51", "data.validation=-0.1", "data.sets.0.weight=0", "data.batch_size=0", "train.clip=-1",
        "train.on_nonfinite=ignore", "run.resume=yes", "run.device=gpu", "run.attention_backward=any", "precision.compute=f16", "schedule.decay=cos",
        "checkpoint.keep=-1", "train.steps=0", "schedule.final=1.5", "run.seed=-1"}) {
    EXPECT_THAT(refusal(path, {word}), HasSubstr("expected")) << word;
  }
}

// What is multiplied or kept in an int ends where that holds it.
TEST_F(RunSchemaTest, NumbersThatTheirUseCannotHoldAreRefused) {
  const std::string path = write("r.yaml", minimal());
  for (const std::string key : {"checkpoint.keep", "train.validate_batches", "mesh.pipeline.microbatches", "data.batch_size", "data.micro_batch", "data.prefetch",
                                "data.sequence_length", "train.steps", "train.sample_tokens", "run.threads"}) {
    for (const char* number : {"9223372036854775807", "1000000000001"})
      EXPECT_THAT(refusal(path, {key + "=" + number}), HasSubstr("command line, " + key + "] out of range")) << number;
  }
  EXPECT_THAT(refusal(path, {"checkpoint.keep=4294967297"}), HasSubstr("expected 0 to 1000000000, got 4294967297"));
  EXPECT_EQ(load(path, {"checkpoint.keep=1000000000"}).options.group("checkpoint").integer("keep"), 1000000000);
}

TEST_F(RunSchemaTest, Contradictions) {
  EXPECT_THAT(contradiction("", {"data.validation=0", "train.validate_every=5"}), HasSubstr("data.validation = 0"));
  EXPECT_THAT(contradiction("", {"train.on_nonfinite=rollback"}), HasSubstr("rollback needs checkpoints"));
  EXPECT_THAT(contradiction("schedule: {decay: wsd, decay_shape: exponential, final: 0}\n"),
              HasSubstr("r.yaml:7, schedule.final] an exponential"));
  EXPECT_THAT(contradiction("", {"data.sets=[]"}), HasSubstr("[command line, data.sets] an empty list"));
  const std::vector<std::string> rollback = {"train.on_nonfinite=rollback", "checkpoint.every_minutes=1"};
  EXPECT_NO_THROW(check_run_options(load(write("r.yaml", minimal()), rollback).options));
  // A few steps of a long recipe, for a try, are no contradiction.
  EXPECT_NO_THROW(check_run_options(load(write("r.yaml", minimal()), {"train.steps=1", "schedule.warmup=50"}).options));
}

void expect_helpful(const Schema& schema, const std::string& path) {
  for (const auto& spec : schema.options()) {
    EXPECT_FALSE(spec.help.empty()) << path << spec.name;
    if (spec.group) expect_helpful(*spec.group, path + spec.name + ".");
  }
}

TEST_F(RunSchemaTest, EveryKeyHasHelp) { expect_helpful(run_schema(), ""); }

TEST_F(RunSchemaTest, TheDocumentationListsWhatTheSchemaSays) {
  std::ifstream stream(std::string(CAPSTAN_SOURCE_DIR) + "/docs/recipes.md");
  const std::string docs{std::istreambuf_iterator<char>(stream), {}};
  std::istringstream rows(help_markdown(run_schema()));
  for (std::string row; std::getline(rows, row);) {
    EXPECT_NE(docs.find(row + "\n"), std::string::npos)
        << "docs/recipes.md lacks the row (capstan recipe keys --markdown):\n"
        << row;
  }
}

}  // namespace
}  // namespace capstan::testing
