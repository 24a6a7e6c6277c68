// Decoding by replayed steps: the same tokens and log-probabilities as by steps that are asked for kernel by kernel.
#include "support.h"
#include "train/session.h"

#include <capstan/inference.h>
#include <gmock/gmock.h>

#include <map>
#include <set>

namespace capstan::train::testing {
namespace {

using ::testing::HasSubstr;

struct Written {
  std::vector<std::int32_t> tokens;
  std::vector<float> logprobs;
  bool operator==(const Written&) const = default;
};

/// `count` requests of growing length, admitted as there is room; by id.
std::map<std::int64_t, Written> completions(const Project& project, const std::string& graphs, int count, std::vector<std::string> more = {}) {
  std::vector<std::string> words{project.dir("unused"), "run.device=cuda", "inference.cuda_graphs=" + graphs, "model.dropout=0", "model.context=160"};
  words.insert(words.end(), more.begin(), more.end());
  const auto session = open_session(project.recipe(), words, CAPSTAN_PROGRAM, Placement::weights);
  session->engine->initialize();
  const auto engine = session->host->make_as<InferenceEngine>(session->options().plugin("inference"));
  std::map<std::int64_t, Written> all;
  for (int round = 0; round < 2; ++round) {  // the second with other pages, and records of its own
    engine->attach(session->model, session->tokenizer, session->device, session->engine->options().compute, 1);
    for (int i = 0; i < count; ++i) {
      Request request;
      request.id = round * 100 + i;
      for (int t = 0; t < 3 + 17 * i; ++t) request.prompt.push_back((t * 31 + i * 7) % 256);
      request.sampling.temperature = i % 2 == 0 ? 0 : 1;
      request.sampling.seed = 5, request.sampling.max_tokens = 6 + 4 * i, request.sampling.logprobs = i != 1;
      engine->submit(std::move(request));
    }
    while (engine->step({})) {}
    for (const Completion& c : engine->finished()) all[c.id] = {c.tokens, c.logprobs};
  }
  return all;
}

TEST(Decoding, RecordedIsAsUnrecorded) {
  Project project;
  for (const int count : {1, 5}) {
    const auto off = completions(project, "off", count);
    EXPECT_EQ(completions(project, "on", count), off);
    ASSERT_EQ(off.size(), static_cast<std::size_t>(2 * count));
    EXPECT_EQ(off.at(0).tokens.size(), 6u);
    if (count < 4) continue;
    const std::vector<std::int32_t>& drawn = off.at(3).tokens;  // at temperature 1: not one token over and over
    EXPECT_GT(std::set<std::int32_t>(drawn.begin(), drawn.end()).size(), 1u);
  }
}

// Pages run short: requests give theirs up and come back, pages are handed to others while records live.
TEST(Decoding, RecordedIsAsUnrecordedWhenPagesRunShort) {
  Project project;
  const std::vector<std::string> tight{"inference.max_tokens_held=256", "inference.max_batch_tokens=24"};
  EXPECT_EQ(completions(project, "on", 5, tight), completions(project, "off", 5, tight));
}

TEST(Decoding, IsRefusedWhereThereIsNoGpuToRecord) {
  Project project;
  try {
    completions(project, "on", 1, {"run.device=cpu"});
    FAIL() << "it was not refused";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("cuda_graphs"));
  }
}

TEST(Decoding, HoldsTheWeightsOfACheckpointInTheirComputeTypeAlone) {
  Project project;
  ASSERT_EQ(train(project.recipe(), {"train.steps=1", "precision.compute=bf16"}).code, 0);
  std::vector<std::vector<std::uint16_t>> values[2];
  for (const bool gpu : {false, true}) {
    const auto session = open_session((project / "run/recipe.yaml").string(), {gpu ? "run.device=cuda" : "run.device=cpu"}, CAPSTAN_PROGRAM, Placement::weights);
    EXPECT_EQ(load_weights(*session, (project / "run").string(), -1, [](const std::string& line) { ADD_FAILURE() << line; }), 1);
    std::int64_t bytes = 0;
    for (const NamedTensor& t : session->engine->tensors(false)) {
      ASSERT_EQ(t.value.dtype(), DType::bf16) << t.name;
      std::vector<std::uint16_t>& v = values[gpu].emplace_back(t.value.numel());
      t.value.copy_to_host(v.data(), t.value.bytes()), bytes += t.value.bytes();
    }
    EXPECT_LT(session->device->bytes_peak(), bytes * 3 / 2) << "no f32 of them was there at any time";
  }
  EXPECT_EQ(values[0], values[1]);
}

}  // namespace
}  // namespace capstan::train::testing
