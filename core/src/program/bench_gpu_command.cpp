// `capstan bench gpu`: what this GPU does at most, then each kernel as a share of that, then whole training steps, beside
// PyTorch's where that is installed.
#include "program/commands.h"

#include "bench/measure_device.h"
#include "bench/steps.h"

#include <capstan/error.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace capstan::program {

namespace {

namespace fs = std::filesystem;
const std::vector<std::string> every_part{"kernels", "products", "attention", "steps"};

struct Words {
  std::vector<std::string> parts = every_part, recipes, overrides;
  std::string python;
  int steps = 10;
  double seconds = 300, peer_seconds = 300;
  bool small = false, json = false, no_peer = false, no_fp8 = false;
};

/// share/capstan/bench of the installation (or build tree) that this program belongs to.
fs::path data_folder(const Program& program) {
  std::error_code ignored;
  const fs::path real = fs::canonical(program.executable, ignored);
  return (ignored ? fs::path(program.executable) : real).parent_path().parent_path() / "share/capstan/bench";
}

std::vector<std::string> step_recipes(const fs::path& folder) {
  std::vector<std::string> all;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    if (entry->path().extension() == ".yaml") all.push_back(entry->path().string());
  if (all.empty()) fail(Fault::input, folder.string(), "there are no recipes to measure: reinstall, or name some with --recipe");
  std::sort(all.begin(), all.end());
  return all;
}

void bench_gpu(const Program& program, const Words& words) {
  const auto say = [&](const std::string& text) {
    if (words.json) return;
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  };
  const auto wanted = [&](const std::string& part) { return std::find(words.parts.begin(), words.parts.end(), part) != words.parts.end(); };
  bench::Table table;
  bool fp8 = false;
  {
    const auto device = make_cuda_device();  // gone before the steps: they want its memory
    table.device = device->describe();
    fp8 = bench::has_fp8(*device);
    say(table.device + "\n");
    if (wanted("kernels") || wanted("products") || wanted("attention")) {
      const bench::Size size = words.small ? bench::Size::small : bench::Size::whole;
      bench::WallStopwatch stopwatch(words.small ? 1e-4 : 0.02, words.small ? 1 : 7);
      table.limits = bench::measure_limits(*device, size, {DType::bf16, DType::f32}, stopwatch, say);
      say(table.limits_text());
      if (wanted("kernels")) bench::measure_cases(table, "kernels", bench::memory_cases(*device, size), *device, stopwatch, say);
      if (wanted("products")) bench::measure_cases(table, "products", bench::product_cases(*device, size), *device, stopwatch, say);
      if (wanted("attention")) bench::measure_cases(table, "attention, bf16, causal", bench::attention_cases(*device, size), *device, stopwatch, say);
    }
  }
  if (wanted("steps")) {
    const fs::path folder = data_folder(program);
    bench::StepPlan plan;
    plan.program = program.executable, plan.script = (folder / "pytorch.py").string();
    plan.steps = words.steps, plan.seconds = words.seconds, plan.peer_seconds = words.peer_seconds, plan.overrides = words.overrides;
    if (words.small) plan.warmup = 1;
    if (!words.no_peer) {
      const std::string python = words.python.empty() ? "python3" : words.python, why = bench::pytorch_problem(python);
      if (why.empty()) plan.python = python;
      else if (!words.python.empty()) fail(Fault::input, "command line, --python", python + " has no PyTorch that can use a GPU: " + why);
      else say("steps run alone: " + python + " has no PyTorch that can use a GPU (" + why + "); --python names another\n");
    }
    say(bench::Table::steps_head_text());
    for (const std::string& recipe : words.recipes.empty() ? step_recipes(folder) : words.recipes) {
      table.steps.push_back(bench::measure_step(plan, recipe));
      say(bench::Table::text(table.steps.back()));
      if (!fp8 || words.no_fp8) continue;
      bench::StepPlan narrow = plan;  // PyTorch's side has been said
      narrow.python.clear(), narrow.overrides.push_back("precision.linear=fp8");
      table.steps.push_back(bench::measure_step(narrow, recipe));
      say(bench::Table::text(table.steps.back()));
    }
  }
  if (words.json) fmt::print("{}\n", table.json());
}

}  // namespace

void add_bench_gpu(CLI::App& bench, Program& program) {
  CLI::App* command = bench.add_subcommand(
      "gpu", "Measure this machine's GPU: copies and products, then each kernel as a share of those, then whole training steps, beside PyTorch's");
  auto words = std::make_shared<Words>();
  command->add_option("overrides", words->overrides, "key.path=value for every step's recipe");
  command->add_option("--part", words->parts, "kernels, products, attention, steps; more than once for several; all by default")
      ->check(CLI::IsMember(every_part))
      ->allow_extra_args(false);
  command->add_option("--recipe", words->recipes, "whose steps are measured, instead of those in share/capstan/bench")->type_name("FILE")->allow_extra_args(false);
  command->add_option("--python", words->python, "a python that has PyTorch, for the same models beside; python3 by default")->type_name("PROGRAM");
  command->add_flag("--no-pytorch", words->no_peer, "without PyTorch");
  command->add_flag("--no-fp8", words->no_fp8, "without a second measurement of each recipe with precision.linear=fp8");
  command->add_option("--steps", words->steps, "steps that count")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--seconds", words->seconds, "most that one recipe may take, and again with precision.linear=fp8")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--pytorch-seconds", words->peer_seconds, "most that PyTorch may take for one recipe, compiling included")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_flag("--small", words->small, "small shapes: to see that everything runs, not how fast");
  command->add_flag("--json", words->json, "one JSON line at the end and nothing else");
  command->callback([words, &program] { bench_gpu(program, *words); });
}

}  // namespace capstan::program
