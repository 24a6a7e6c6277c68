// `capstan recipe show|check|keys`: what a recipe comes to, whether it is right, and what it may say.
#include "program/commands.h"

#include "plan/paper_world.h"
#include "plan/report.h"
#include "plugin/host.h"
#include "recipe/recipe.h"
#include "recipe/run_schema.h"
#include "train/estimate.h"
#include "train/precision.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::program {
namespace {

struct Words {
  std::string recipe;
  std::vector<std::string> overrides;
  bool plain = false, markdown = false;
  int ranks = 0;  // 0: check alone
  std::string device, devices;
  bool json = false;
};

/// What a step would take on each of many ranks.
void plan_step(const Program& program, const Words& words) {
  const auto session = train::open_session(words.recipe, words.overrides, program.executable, train::Placement::none,
                                           plan::make_paper_world(0, words.ranks));
  train::check_lengths(*session);
  std::optional<plan::DeviceModel> device;
  if (!words.device.empty()) device = plan::load_device(words.devices.empty() ? plan::devices_file(program.executable) : words.devices, words.device);
  const plan::Setting setting = plan::setting_from(*session, words.ranks);
  const plan::Sources sources = plan::sources_from(*session);
  const plan::DeviceModel* known = device ? &*device : nullptr;
  plan::Prediction prediction;
  train::with_sizes_of(session->options(), [&] { prediction = plan::predict(sources, setting, known); });
  std::vector<plan::Advice> advice;
  if (known != nullptr && static_cast<double>(prediction.memory[prediction.worst].total()) > known->memory)
    advice = plan::advise(sources, setting, known->memory);
  if (words.json) {
    fmt::print("{}", plan::to_json(prediction, setting, known, advice));
    return;
  }
  fmt::print("{}: {} ({} parameters)\n", words.recipe, session->model->describe(), prediction.parameters);
  fmt::print("{}", plan::to_text(prediction, setting, known, advice));
}

void show(const Program& program, const Words& words) {
  PluginHost host(program.executable);
  const Recipe recipe = load_recipe(words.recipe, words.overrides, run_schema(), host);
  if (!words.plain)
    fmt::print("# {}, resolved; xxh3 {}\n", fmt::join(recipe.files, " under "), recipe_digest(recipe.options));
  fmt::print("{}", to_yaml(recipe, words.plain ? Origins::hide : Origins::show));
}

void check(const Program& program, const Words& words) {
  if (words.ranks > 0) return plan_step(program, words);
  // Everything is made as for training, but no memory is taken: the estimate runs on the meta device.
  // A mesh is checked over the fewest ranks that make it.
  int ranks = 1;
  {
    PluginHost host(program.executable);
    const Recipe recipe = load_recipe(words.recipe, words.overrides, run_schema(), host);
    const Options& mesh = recipe.options.group("mesh");
    for (const char* axis : {"pp", "replicate", "shard", "context", "tensor"})
      ranks = static_cast<int>(std::min<std::int64_t>(1 << 24, ranks * std::max<std::int64_t>(1, mesh.integer(axis))));
  }
  const auto session = train::open_session(words.recipe, words.overrides, program.executable, train::Placement::none, plan::make_paper_world(0, ranks));
  const Recipe& recipe = session->recipe;
  const Options& options = session->options();
  const PluginHost& host = *session->host;
  train::check_lengths(*session);
  const train::Estimate estimate = train::estimate_step(*session);
  const Options& data = options.group("data");
  const Options& train = options.group("train");
  const std::int64_t sequences = data.integer("batch_size"), length = data.integer("sequence_length"),
                     steps = train.integer("steps");
  fmt::print("{} is valid\n", words.recipe);
  const auto row = [](const std::string& name, const std::string& text) { fmt::print("  {:<11}{}\n", name, text); };
  row("files", fmt::format("{}", fmt::join(recipe.files, ", ")));
  for (const char* kind : {"model", "tokenizer", "optimizer", "inference"}) row(kind, options.plugin(kind).name);
  row("checkpoint", options.group("checkpoint").plugin("format").name);
  row("precision", train::describe_precision(*session));
  const std::vector<Options>& sets = data.groups("sets");
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const std::string problem = train::problem_of_set(sets[i], std::span(sets).first(i)).what;
    row("data", fmt::format("{} (weight {})", sets[i].path("path"), sets[i].number("weight")) + (problem.empty() ? "" : "; a run is refused here: " + problem));
  }
  row("training", fmt::format("{} steps of {} sequences x {} tokens, {:.4g} million tokens in all", steps, sequences, length,
                              1e-6 * double(steps) * double(sequences) * double(length)));
  row("parameters", fmt::format("{} ({})", estimate.parameters, session->model->describe()));
  row("memory", train::describe_memory(estimate, ranks > 1));
  row("compute", fmt::format("{:.4g} GFLOP a step, {:.4g} MFLOP a token", estimate.step_flop * 1e-9, estimate.model_flop_per_token * 1e-6));
  row("xxh3", recipe_digest(options));
  for (const auto& plugin : host.loaded())
    row("plugin", fmt::format("{} {} {} ({})", plugin.kind, plugin.name, plugin.version, plugin.file));
}

void keys(const Words& words) {
  const Schema schema = run_schema();
  fmt::print("{}", words.markdown ? help_markdown(schema) : help_text(schema));
}

}  // namespace

void add_recipe(CLI::App& app, Program& program) {
  auto words = std::make_shared<Words>();
  CLI::App* recipe = app.add_subcommand("recipe", "Show or check a recipe without running it");
  recipe->require_subcommand(1);
  const auto add_words = [&words](CLI::App* command) {
    command->add_option("recipe", words->recipe, "the recipe file (.yaml)")->required()->type_name("RECIPE");
    command->add_option("overrides", words->overrides, "values that replace the recipe's, such as train.steps=100")
        ->type_name("KEY.PATH=VALUE");
  };
  CLI::App* show_command = recipe->add_subcommand("show", "Print the resolved recipe, each value with where it comes from");
  add_words(show_command);
  show_command->add_flag("--plain", words->plain, "without comments: a recipe that runs as it is");
  show_command->callback([&program, words] { show(program, *words); });

  CLI::App* check_command =
      recipe->add_subcommand("check", "Say whether the recipe would be accepted, and what it amounts to");
  add_words(check_command);
  CLI::Option* ranks = check_command->add_option("--ranks", words->ranks, "memory and traffic of a step on each of N ranks")
                           ->type_name("N")->check(CLI::Range(1, 1 << 24));
  check_command->add_option("--device", words->device, "and its time on devices of this kind: h200, h100, cpu, ...")->type_name("NAME")->needs(ranks);
  check_command->add_option("--devices", words->devices, "another table of devices than share/capstan/devices.yaml")->type_name("FILE")->needs(ranks);
  check_command->add_flag("--json", words->json, "the prediction as JSON")->needs(ranks);
  check_command->callback([&program, words] { check(program, *words); });

  CLI::App* keys_command =
      recipe->add_subcommand("keys", "List every key of a recipe; those of plugins: capstan plugin info");
  keys_command->add_flag("--markdown", words->markdown, "as a Markdown table");
  keys_command->callback([words] { keys(*words); });
}

}  // namespace capstan::program
