// What `capstan bench gpu` computes from what it measures: by a clock that tests wind, and end to end on the emulated GPU.
#include "bench/child.h"
#include "bench/measure_device.h"
#include "bench/op_table.h"
#include "bench/steps.h"

#include <kernels/backend.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

namespace capstan::bench {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

/// Runs the work once and says that it took this long.
class Wound final : public Stopwatch {
 public:
  explicit Wound(double seconds) : seconds_(seconds) {}
  double seconds(Device&, const std::function<void()>& work) override {
    work(), ++calls;
    return seconds_;
  }
  int calls = 0;

 private:
  double seconds_;
};

TEST(OpTable, RatesStandWhereTheClockCanTellThem) {
  // Two steps of one second in all, by a clock whose readings take a microsecond.
  const std::vector<OpRecord> ops{{"none", 20, {}, 20e-6},
                                  {"short", 20, {1e6, 1e6, 1e6}, 199e-6},
                                  {"linear", 20, {4e8, 1e7, 1e7}, 0.4},
                                  {"norm", 20, {1e6, 1e6, 1e6}, 201e-6},
                                  {"elsewhere", 20, {1e9, 1e10, 1e10}, 20e-6},
                                  {"no time", 2, {1, 0, 0}, 0}};
  const std::string text = op_table(ops, 2, 1, 1e-6);
  for (const char* line : {"  linear                         10    200.00   40.0%         1      0.1\n",
                           "  norm                           10      0.10    0.0%         5     10.0\n",
                           "  short                          10      0.10    0.0%         -        -\n",
                           "  none                           10      0.01    0.0%         -        -\n",
                           "  no time                         1      0.00    0.0%         -        -\n",
                           "  elsewhere                      10         -       -  within another op\n"})
    EXPECT_THAT(text, HasSubstr(line));
  EXPECT_LT(text.find("linear"), text.find("norm"));
  EXPECT_THAT(text, AllOf(HasSubstr("(between ops)"), Not(HasSubstr("nan")), Not(HasSubstr("inf"))));
}

TEST(OpTable, AnEmptyScopeTakesLittleAndIsForgotten) {
  const auto device = make_cpu_device(1);
  { OpScope scope(*device, "before", {}); }
  const double seconds = empty_scope_seconds(*device);
  EXPECT_GT(seconds, 0);
  EXPECT_LT(seconds, 1e-3);
  EXPECT_TRUE(device->ledger().empty());
  EXPECT_FALSE(device->recording());
}

TEST(BenchTable, RatesAndSharesFollowFromBytesFlopAndSeconds) {
  Table t;
  t.device = "a chip";
  t.limits.copy = 4e12, t.limits.products = {{DType::bf16, 8e14}};
  t.rows = {{"kernels", "norm", Bound::memory(), 2e9, 1e-3, ""},
            {"attention", "attention", Bound::products(DType::bf16), 4e11, 1e-3, ""},
            {"attention", "in f32", Bound::products(DType::f32), 4e11, 1e-3, ""},
            {"attention", "known", Bound::products(DType::bf16), 4e11, 1e-3, "", {5.91e14, "a library, a chip"}},
            {"attention", "none", Bound::products(DType::bf16), 4e11, 0, "no engine"}};
  EXPECT_DOUBLE_EQ(t.rows[0].rate(), 2e12);
  EXPECT_DOUBLE_EQ(t.share(t.rows[0]), 0.5);
  EXPECT_DOUBLE_EQ(t.share(t.rows[1]), 0.5);
  EXPECT_EQ(t.share(t.rows[2]), 0) << "its limit was not measured";
  t.steps = {{"m", "bf16", 1000, 3e14, 0.375, 20480, "", 0.981, StepRow::Peer{"PyTorch 2", 800, 30000, ""}}, {"n", "", 0, 0, 0, 0, "out of memory", 0, {}}};
  EXPECT_DOUBLE_EQ(t.steps[0].ratio(), 1.25);
  const std::string text = t.text();
  for (const char* part : {"a chip", "4000 GB/s", "800.0 TFLOP/s", "1000.0          2000 GB/s    50.0 %", "400.0 TFLOP/s    50.0 %", "400.0 TFLOP/s         -", "50.0 %   a library, a chip: 591\n", "none", "failed: no engine", "37.5 %", "98.1 %",
                           "800 tokens/s (1.25x)", "failed: out of memory"})
    EXPECT_THAT(text, HasSubstr(part));
  const auto j = nlohmann::json::parse(t.json());
  EXPECT_EQ(j["limits"]["product_flops"]["bf16"], 8e14);
  EXPECT_EQ(j["rows"][0]["bytes_per_s"], 2e12);
  EXPECT_EQ(j["rows"][0]["share"], 0.5);
  EXPECT_FALSE(j["rows"][2].contains("share"));
  EXPECT_EQ(j["rows"][3]["reference"]["flops"], 5.91e14);
  EXPECT_EQ(j["rows"][3]["reference"]["of"], "a library, a chip");
  EXPECT_FALSE(j["rows"][2].contains("reference"));
  EXPECT_EQ(j["rows"][4]["problem"], "no engine");
  EXPECT_EQ(j["steps"][0]["peer"]["ratio"], 1.25);
  EXPECT_EQ(j["steps"][0]["busy_share"], 0.981);
  EXPECT_EQ(j["steps"][1]["problem"], "out of memory");
}

// Every case runs, on any device, and its amount is that of its shape.
TEST(BenchCases, EveryCaseRunsAndCountsItsOperandsOnce) {
  const auto device = make_cpu_device(1);
  Wound clock(1e-3);
  Table t;
  std::string said;
  const auto say = [&](const std::string& text) { said += text; };
  t.limits = measure_limits(*device, Size::small, {DType::bf16, DType::f32}, clock, say);
  EXPECT_DOUBLE_EQ(t.limits.copy, 8 * 4096 / 1e-3);
  EXPECT_DOUBLE_EQ(t.limits.products.at(DType::bf16), 2.0 * 64 * 64 * 64 / 1e-3);
  measure_cases(t, "kernels", memory_cases(*device, Size::small), *device, clock, say);
  measure_cases(t, "products", product_cases(*device, Size::small), *device, clock, say);
  measure_cases(t, "attention", attention_cases(*device, Size::small), *device, clock, say);
  EXPECT_EQ(static_cast<std::size_t>(clock.calls), t.rows.size() + 3);
  std::map<std::string, double> amounts;
  for (const Row& row : t.rows) {
    EXPECT_EQ(row.problem, "") << row.name;
    EXPECT_GT(row.amount, 0) << row.name;
    EXPECT_TRUE(amounts.emplace(row.name, row.amount).second) << "two rows of this name: " << row.name;
    EXPECT_THAT(said, HasSubstr(row.name));
  }
  const double x = 2 * 48 * 96, blocks = 4.0 * 96 * static_cast<double>(device->backend().norm_blocks(48, 96));
  EXPECT_EQ(amounts.at("rms_norm bf16 48 x 96"), 2 * x);
  EXPECT_EQ(amounts.at("rms_norm_backward bf16 48 x 96"), 3 * x + blocks);
  EXPECT_EQ(amounts.at("layer_norm_backward bf16 48 x 96"), 3 * x + 2 * blocks);
  EXPECT_EQ(amounts.at("add_rms_norm bf16 48 x 96"), 4 * x);                     // two in, the sum and its norm out
  EXPECT_EQ(amounts.at("add_rms_norm_backward bf16 48 x 96"), 4 * x + blocks);  // what was normalized and two gradients in, one out
  EXPECT_EQ(amounts.at("softmax bf16 48 x 96"), 2 * x);
  EXPECT_EQ(amounts.at("score_rows to bf16 gradient f32 8 x 512"), 8 * 512 * 6);
  EXPECT_EQ(amounts.at("gelu bf16 32 x 64"), 32 * 64 * 4);
  EXPECT_EQ(amounts.at("swiglu bf16 32 x 64"), 32 * 64 * 3);           // two halves in, one out
  EXPECT_EQ(amounts.at("swiglu_backward bf16 32 x 64"), 32 * 64 * 5);  // halves and gradient in, two halves out
  EXPECT_EQ(amounts.at("cast f32 to bf16"), 32 * 64 * 6);
  EXPECT_EQ(amounts.at("column slice bf16, a quarter"), 32 * 16 * 4);
  EXPECT_EQ(amounts.at("adamw f32 0 M weights"), 28 * 1000);  // weight, two moments in and out, gradient in
  EXPECT_EQ(amounts.at("attention 2 x 70, 4/2 heads of 16"), 4.0 * 2 * 4 * 16 * (70 * 70 / 2.0));
  EXPECT_EQ(amounts.at("attention 1 x 100, 2/1 heads of 16, window 33"), 4.0 * 2 * 16 * (33 * 33 / 2.0 + 67 * 33));
  EXPECT_EQ(amounts.at("  backward, any order 2 x 70, 4/2 heads of 16"), 2.5 * amounts.at("attention 2 x 70, 4/2 heads of 16"));
  EXPECT_EQ(amounts.at("product bf16 64 x 16 x 16 (GPT-2 1.5B up)"), 2.0 * 64 * 16 * 16);
  for (const char* same : {"  and GELU (GPT-2 1.5B up)", "  dx (GPT-2 1.5B up)", "  dW, f32 (GPT-2 1.5B up)", "  dW, added in f32 (GPT-2 1.5B up)", "  dW and db, added in f32 (GPT-2 1.5B up)",
                           "product fp8 64 x 16 x 16 (GPT-2 1.5B up)", "  fp8 dx (GPT-2 1.5B up)", "  fp8 dW, added in f32 (GPT-2 1.5B up)", "  dx times GELU's slope (GPT-2 1.5B down)"})
    EXPECT_EQ(amounts.at(same), 2.0 * 64 * 16 * 16) << same;
  for (const Row& row : t.rows) {
    const bool known = row.name == "attention 1 x 100, 2/1 heads of 16, window 33" || row.name == "  backward, any order 1 x 100, 2/1 heads of 16, window 33";
    EXPECT_EQ(row.reference.rate > 0, known) << row.name;
  }
  EXPECT_THAT(said, HasSubstr("cuDNN 9.19.1, H200: 2\n"));
  for (const char* kernel : {"rope", "embedding bf16", "embedding_backward", "transpose", "column_sum", "  backward, one order", "product bf16", "quantize bf16 to e4m3"})
    EXPECT_THAT(said, HasSubstr(kernel));
}

TEST(BenchCases, WhatACaseThrowsIsItsRow) {
  const auto device = make_cpu_device(1);
  Wound clock(1e-3);
  Table t;
  const Case bad{"bad", Bound::memory(), 1, []() -> std::function<void()> { throw std::runtime_error("no room"); }};
  const Case good{"good", Bound::memory(), 1, []() -> std::function<void()> { return [] {}; }};
  measure_cases(t, "kernels", {bad, good}, *device, clock, [](const std::string&) {});
  ASSERT_EQ(t.rows.size(), 2u);
  EXPECT_EQ(t.rows[0].problem, "no room");
  EXPECT_EQ(t.rows[1].seconds, 1e-3);
}

TEST(BenchStopwatch, CallsUntilAGroupIsLongEnough) {
  const auto device = make_cpu_device(1);
  int calls = 0;
  WallStopwatch watch(1e-3, 3);
  const double seconds = watch.seconds(*device, [&] {
    ++calls;
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (std::chrono::steady_clock::now() < end) {
    }
  });
  EXPECT_GE(seconds, 50e-6);
  EXPECT_GT(calls, 3);
}

TEST(BenchChild, GivesBothOutputsAndTheCode) {
  const ChildResult r = run_child({"sh", "-c", "echo out; echo first >&2; echo last >&2; exit 3"}, 20);
  EXPECT_EQ(r.status, 3);
  EXPECT_EQ(r.out, "out\n");
  EXPECT_EQ(r.last_words(), "last");
  EXPECT_EQ(run_child({"capstan-no-such-program"}, 20).status, 127);
  const ChildResult late = run_child({"sh", "-c", "sleep 60; echo never"}, 0.2);
  EXPECT_EQ(late.status, 128 + SIGKILL);
  EXPECT_THAT(late.last_words(), HasSubstr("was ended"));
}

class BenchSteps : public ::testing::Test {
 protected:
  fs::path folder = fs::temp_directory_path() / ("capstan-bench-" + std::to_string(getpid()));
  StepPlan plan;
  void SetUp() override {
    fs::create_directories(folder);
    write("tiny.yaml",
          "model: {plugin: gpt, layers: 1, heads: 2, width: 16, context: 8, vocabulary: 300}\n"
          "data: {sets: [{path: unused}], sequence_length: 8, batch_size: 2}\ntrain: {steps: 1}\nprecision: {compute: bf16}\n");
    plan.program = CAPSTAN_PROGRAM, plan.device = "cpu", plan.steps = 1, plan.warmup = 0, plan.seconds = 60;
    plan.overrides = {"run.threads=1"};
  }
  void TearDown() override { fs::remove_all(folder); }
  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(folder / name) << text;
    return (folder / name).string();
  }
  std::string tiny() const { return (folder / "tiny.yaml").string(); }
};

TEST_F(BenchSteps, AStepIsMeasuredAndPyTorchIsToldTheModel) {
  // Stands for Python: checks that it was given the recipe, answers as the script does.
  plan.python = "sh";
  plan.script = write("peer.sh", "case \"$2\" in *'\"batch_size\":2'*'\"width\":16'*) echo note; echo '{\"engine\": \"PyTorch 9\", \"tokens_per_s\": 2.0, \"peak_mib\": 7}';; *) echo \"got $2\" >&2; exit 1;; esac\n");
  const StepRow row = measure_step(plan, tiny());
  EXPECT_EQ(row.problem, "");
  EXPECT_EQ(row.model, "tiny");
  EXPECT_EQ(row.precision, "bf16");
  EXPECT_GT(row.tokens_per_second, 0);
  EXPECT_GT(row.peak_share, 0);
  ASSERT_TRUE(row.peer);
  EXPECT_EQ(row.peer->problem, "");
  EXPECT_EQ(row.peer->engine, "PyTorch 9");
  EXPECT_DOUBLE_EQ(row.ratio(), row.tokens_per_second / 2);
}

TEST_F(BenchSteps, WhatFailsSaysWhy) {
  const StepRow none = measure_step(plan, (folder / "missing.yaml").string());
  EXPECT_THAT(none.problem, HasSubstr("missing.yaml"));
  plan.python = "sh", plan.script = write("peer.sh", "echo 'CUDA out of memory' >&2; exit 1\n");
  const StepRow row = measure_step(plan, tiny());
  EXPECT_EQ(row.problem, "");
  ASSERT_TRUE(row.peer);
  EXPECT_EQ(row.peer->problem, "CUDA out of memory");
  EXPECT_EQ(row.ratio(), 0);
  plan.script = write("peer.sh", "sleep 60\n"), plan.peer_seconds = 0.2;  // its limit is not ours
  EXPECT_THAT(measure_step(plan, tiny()).peer->problem, HasSubstr("was ended"));
  EXPECT_THAT(pytorch_problem("capstan-no-such-python"), HasSubstr("No such file"));
}

// The recipes that ship are read and say what the models are: on the meta device nothing else can be wrong with them.
TEST_F(BenchSteps, TheRecipesThatShipAreTheModelsTheyName) {
  const std::map<std::string, std::string> parameters{{"gpt2_124m", "124439808"}, {"gpt2_1558m", "1557611200"}, {"qwen2_5_0_5b", "494005120"},
                                                      {"qwen2_5_1_5b", "1543656960"}, {"llama3_8b_8_layers", "2795573248"}};
  std::set<std::string> seen;
  for (const auto& entry : fs::directory_iterator(std::string(CAPSTAN_SOURCE_DIR) + "/core/data/bench")) {
    if (entry.path().extension() != ".yaml") continue;
    const std::string name = entry.path().stem().string();
    seen.insert(name);
    const ChildResult r = run_child({CAPSTAN_PROGRAM, "recipe", "check", entry.path().string(), "--ranks", "1", "--device", "h200"}, 120);
    EXPECT_EQ(r.status, 0) << r.errors;
    ASSERT_TRUE(parameters.contains(name)) << name;
    EXPECT_THAT(r.out, HasSubstr("(" + parameters.at(name) + " parameters)")) << name;
  }
  EXPECT_EQ(seen.size(), parameters.size());
}

/// The whole command, with the emulated GPU for one.
TEST_F(BenchSteps, TheCommandOnAnEmulatedGpuHasEveryRow) {
  const fs::path emulated = fs::path(CAPSTAN_BUILD_DIR) / "lib/emulated";
  if (!fs::exists(emulated / "libcapstan_cuda.so")) GTEST_SKIP() << "this build has no CUDA part";
  const std::vector<std::string> words{"env", "LD_LIBRARY_PATH=" + emulated.string(), "OMP_NUM_THREADS=1", CAPSTAN_PROGRAM, "bench", "gpu", "--small", "--no-pytorch", "--steps", "1",
                                       "--recipe", tiny(), "run.threads=1"};
  const ChildResult text = run_child(words, 140);
  ASSERT_EQ(text.status, 0) << text.errors << text.out;
  for (const char* part : {"copy, read and written", "product, bf16", "product, f32", "kernels", "rms_norm", "gradient_norm f32", "products", "  dx (", "  dW, f32", "and GELU", "GELU's slope", "dW and db", "product fp8", "fp8 dx", "fp8 dW", "cuDNN 9.19.1, H200", "attention", "any order", "training step", "tiny", "alone", "bf16+fp8", "product, f8e4m3"})
    EXPECT_THAT(text.out, HasSubstr(part));
  EXPECT_THAT(text.out, ::testing::Not(HasSubstr("failed")));
  std::vector<std::string> again = words;
  again.insert(again.end(), {"--json", "--part", "attention", "--part", "steps"});
  const ChildResult json = run_child(again, 140);
  ASSERT_EQ(json.status, 0) << json.errors;
  const auto j = nlohmann::json::parse(json.out);
  EXPECT_GT(j["limits"]["copy_bytes_per_s"], 0);
  ASSERT_EQ(j["rows"].size(), 6u);
  for (const auto& row : j["rows"]) EXPECT_GT(row["share"], 0) << row;
  ASSERT_EQ(j["steps"].size(), 2u);
  EXPECT_EQ(j["steps"][1]["precision"], "bf16+fp8");
  EXPECT_GT(j["steps"][0]["tokens_per_s"], 0);
  EXPECT_GT(j["steps"][0]["peak_mib"], 0);
  for (const auto& step : j["steps"]) {
    EXPECT_GT(step["busy_share"], 0) << step;
    EXPECT_LE(step["busy_share"], 1) << step;
  }
}

TEST_F(BenchSteps, WithoutAGpuItSaysWhatIsMissing) {
  const ChildResult r = run_child({CAPSTAN_PROGRAM, "bench", "gpu"}, 60);
  if (r.status == 0) GTEST_SKIP() << "this machine has a GPU";
  EXPECT_EQ(r.status, 2);
  EXPECT_THAT(r.errors, HasSubstr("run.device: cpu"));
  const ChildResult nothing = run_child({CAPSTAN_PROGRAM, "bench"}, 60);
  EXPECT_EQ(nothing.status, 2);
  EXPECT_THAT(nothing.errors, HasSubstr("expected a recipe"));
}

}  // namespace
}  // namespace capstan::bench
