// `capstan generate` as a person runs it, over a run that `capstan train` has just written.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>

#include <unistd.h>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

struct Result {
  int code = -1;
  std::string out, err;
};

class Generate : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder = fs::temp_directory_path() / ("capstan_generate_" + std::to_string(getpid()));
    fs::create_directories(folder);
    std::ofstream(folder / "text.txt") << [] {
      std::string text;
      for (int i = 0; i < 400; ++i) text += "the cat sat on the mat and the dog sat on the log\n";
      return text;
    }();
    std::ofstream(folder / "recipe.yaml") << "model: {plugin: gpt, layers: 1, heads: 2, width: 32, context: 64}\n"
                                             "tokenizer: byte\n"
                                             "data:\n"
                                             "  sets: [{path: data/text, text: [text.txt]}]\n"
                                             "  sequence_length: 64\n"
                                             "  batch_size: 4\n"
                                             "  validation: 0\n"
                                             "optimizer: {plugin: adamw, lr: 1e-2}\n"
                                             "train: {steps: 30}\n"
                                             "checkpoint: {every_steps: 10}\n";
    trained = run("train " + (folder / "recipe.yaml").string() + " run.threads=1 run.dir=" + (folder / "run").string());
  }
  static void TearDownTestSuite() { fs::remove_all(folder); }
  void SetUp() override { ASSERT_EQ(trained.code, 0) << trained.out << trained.err; }

  static Result run(const std::string& words, const std::string& before = "") {
    Result result;
    const std::string errors = (folder / "stderr").string();
    FILE* pipe = popen((before + std::string(CAPSTAN_PROGRAM) + " " + words + " 2>" + errors).c_str(), "r");
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) result.out.append(buffer.data(), n);
    const int status = pclose(pipe);
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
    std::ifstream file(errors);
    result.err.assign(std::istreambuf_iterator<char>(file), {});
    return result;
  }
  static Result generate(const std::string& words, const std::string& before = "") {
    return run("generate " + (folder / "run").string() + " " + words, before);
  }

  static fs::path folder;
  static Result trained;
};

fs::path Generate::folder;
Result Generate::trained;

TEST_F(Generate, ContinuesThePromptTheSameWayForTheSameSeed) {
  const Result a = generate("--prompt 'the cat' --max-tokens 40 --seed 3");
  EXPECT_EQ(a.code, 0) << a.err;
  EXPECT_THAT(a.out, StartsWith("the cat"));
  EXPECT_GT(a.out.size(), 20u);
  EXPECT_THAT(a.err, AllOf(HasSubstr("weights of step 30"), HasSubstr("tokens/s")));
  EXPECT_EQ(generate("--prompt 'the cat' --max-tokens 40 --seed 3 run.threads=2").out, a.out);
  EXPECT_NE(generate("--prompt 'the cat' --max-tokens 40 --seed 4").out, a.out);
}

TEST_F(Generate, LearnsTheText) {
  // Some hundred steps on one sentence: what comes after the prompt is that sentence.
  const Result longer = run("train " + (folder / "recipe.yaml").string() + " run.threads=1 train.steps=400 run.dir=" + (folder / "longer").string());
  ASSERT_EQ(longer.code, 0) << longer.err;
  const std::string prompt = "the cat sat on ";
  const Result r = run("generate " + (folder / "longer").string() + " --prompt '" + prompt + "' --max-tokens 40 --temperature 0");
  ASSERT_THAT(r.out, StartsWith(prompt));
  EXPECT_THAT(r.out.substr(prompt.size()), AllOf(StartsWith("the "), HasSubstr(" sat on the ")));
}

TEST_F(Generate, CompletionsDoNotDependOnHowManyThereAre) {
  const std::string two = generate("--prompt 'the ' --max-tokens 20 --count 2").out;
  const std::string four = generate("--prompt 'the ' --max-tokens 20 --count 4").out;
  const auto text_of = [](const std::string& all, int n) {
    const std::size_t at = all.find('\n', all.find("--- " + std::to_string(n) + " of ")) + 1;
    return all.substr(at, all.find("\n--- ", at) - at);
  };
  EXPECT_THAT(four, HasSubstr("--- 4 of 4 (ended by its length)"));
  EXPECT_EQ(text_of(two, 1), text_of(four, 1));
  EXPECT_NE(text_of(four, 1), text_of(four, 3));
  EXPECT_EQ(generate("--prompt 'the ' --max-tokens 20").out, text_of(four, 1) + "\n");
}

TEST_F(Generate, StopTextsEndIt) {
  const std::string whole = generate("--prompt 'the cat sat' --max-tokens 40 --temperature 0").out;
  const std::string stop = whole.substr(20, 2);
  const Result cut = generate("--prompt 'the cat sat' --max-tokens 40 --temperature 0 --stop '~~~' --stop '" + stop + "'");
  EXPECT_EQ(cut.out, whole.substr(0, whole.find(stop, 11)) + "\n");
  EXPECT_THAT(cut.err, HasSubstr("ended by a stop text"));
}

TEST_F(Generate, TakesEverySeedOf64Bits) {
  EXPECT_EQ(generate("--prompt x --max-tokens 2 --seed 18446744073709551615").code, 0);
}

TEST_F(Generate, PromptsComeFromFilesAndFromStandardInput) {
  std::ofstream(folder / "prompt.txt") << "the dog";
  const std::string expected = generate("--prompt 'the dog' --max-tokens 10").out;
  EXPECT_EQ(generate("--prompt-file " + (folder / "prompt.txt").string() + " --max-tokens 10").out, expected);
  EXPECT_EQ(generate("--prompt-file - --max-tokens 10", "printf 'the dog' | ").out, expected);
}

TEST_F(Generate, AnEarlierStepsWeightsCanBeUsed) {
  const Result r = generate("--prompt 'the ' --step 10 --max-tokens 5");
  EXPECT_EQ(r.code, 0);
  EXPECT_THAT(r.err, HasSubstr("weights of step 10"));
}

TEST_F(Generate, BadInputIsSaidAndEndsWithTwo) {
  const auto refused = [](const Result& r, const std::string& what) {
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_THAT(r.err, HasSubstr(what));
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, Not(HasSubstr("weights of step")));
  };
  refused(run("generate " + (folder / "nowhere").string()), "no run folder");
  refused(generate("--step 7"), "step 7");
  refused(generate("--prompt-file " + (folder / "none").string()), "cannot be read");
  refused(generate("--prompt-file " + folder.string()), "cannot be read");
  refused(generate("--prompt x --seed -1"), "--seed: expected an integer from 0 to 18446744073709551615, got -1");
  refused(generate("--prompt x --seed=-1"), "got -1");
  refused(generate("--prompt x --seed 18446744073709551616"), "got 18446744073709551616");
  refused(generate("--prompt x --prompt-file y"), "--prompt");
  const Result graphs = generate("--prompt x inference.cuda_graphs=on");
  EXPECT_EQ(graphs.code, 2);
  EXPECT_THAT(graphs.err, HasSubstr("[command line, inference.cuda_graphs] there is no GPU to record steps on: expected auto or off here, got on"));
  EXPECT_EQ(generate("--prompt " + std::string(65, 'x')).code, 2);
  EXPECT_THAT(generate("--prompt " + std::string(65, 'x')).err, HasSubstr("at most 64"));
}

TEST_F(Generate, SamplingOptionsOutOfRangeAreNamedBeforeAnythingIsRead) {
  const auto refused = [](const std::string& words, const std::string& what) {
    const Result r = run("generate " + (folder / "nowhere").string() + " " + words);
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_THAT(r.err, HasSubstr(what));
    EXPECT_THAT(r.err, Not(HasSubstr("no run folder")));
  };
  refused("--temperature=-0.5", "[--temperature] expected a number of 0 or more, got -0.5");
  refused("--temperature nan", "[--temperature] expected a number of 0 or more, got nan");
  refused("--temperature inf", "[--temperature] expected");
  refused("--top-k=-1", "[--top-k] expected 0 (all tokens) or more, got -1");
  refused("--top-p 2", "[--top-p] expected a number above 0, at most 1 (all tokens), got 2");
  refused("--top-p 0", "[--top-p] expected a number above 0, at most 1 (all tokens), got 0");
  refused("--min-p 1.5", "[--min-p] expected a number from 0 (all tokens) to 1, got 1.5");
  refused("--max-tokens 0", "[--max-tokens] expected 1 or more, got 0");
  refused("--stop end --stop ''", "[--stop] expected a text of at least one character, got an empty one");
}

TEST_F(Generate, ADamagedCheckpointIsPassedOverLoudly) {
  const fs::path copy = folder / "damaged";
  fs::copy(folder / "run", copy, fs::copy_options::recursive);
  for (const auto& entry : fs::directory_iterator(copy / "checkpoints/step_000030")) {
    if (entry.path().extension() != ".h5") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(0, std::ios::end);
    const std::streamoff middle = file.tellg() / 2;
    file.seekg(middle);
    const char byte = static_cast<char>(file.get());
    file.seekp(middle);
    file.put(static_cast<char>(byte ^ 1));
  }
  const Result r = run("generate " + copy.string() + " --prompt 'the ' --max-tokens 5");
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.err, AllOf(HasSubstr("step_000030"), HasSubstr("weights of step 20")));
}

}  // namespace
