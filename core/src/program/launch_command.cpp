// `capstan launch [--ranks N] [--max-restarts n] [--timeout s] -- train RECIPE [key.path=value ...]`
#include "launch/launch.h"
#include "launch/supervise.h"
#include "program/commands.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::program {
namespace {

struct LaunchWords {
  std::optional<int> ranks;
  int max_restarts = 0;
  double timeout = 0, backoff = 1;
  std::vector<std::string> command;
};

int launch_job(const LaunchWords& words, const std::string& executable) {
  std::vector<std::string> command = words.command;
  const auto refuse = [](const std::string& what) { fail(Fault::input, "launch", what); };
  if (command.empty() || command.front() != "train")
    refuse(fmt::format("expected `train RECIPE ...` behind --, got '{}'", command.empty() ? "" : command.front()));
  command.erase(command.begin());
  std::optional<int> ranks = words.ranks;
  if (const auto at = std::find(command.begin(), command.end(), "--ranks"); at != command.end())
    refuse("--ranks belongs ahead of --: capstan launch --ranks N -- train RECIPE");
  if (command.empty()) refuse("train what? Expected a recipe behind `train`");
  if (const auto at = std::find_if(command.begin(), command.end(), [](const std::string& w) { return w.starts_with("-"); });
      at != command.end())
    refuse("unknown option '" + *at + "' behind train");
  const launch::Launch here = launch::Launch::detect(ranks);
  if (here.by.launcher != "itself" && here.by.launcher != "--ranks")
    refuse(
        fmt::format("this is a rank already: {}. Start `capstan launch` itself once, or train without it", here.describe()));
  const std::string recipe = command.front();
  command.erase(command.begin());
  if (words.timeout > 0) command.push_back(fmt::format("mesh.timeout_seconds={}", words.timeout));
  launch::Job job = training_job(executable, ranks.value_or(1), recipe, command);
  job.max_restarts = words.max_restarts;
  job.backoff_seconds = words.backoff;
  job.name = "capstan launch";
  return launch::supervise(job);
}

}  // namespace

void add_launch(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand(
      "launch", "Supervise a training job: start it again from its newest good checkpoint when a rank fails");
  auto words = std::make_shared<LaunchWords>();
  command->add_option("--ranks", words->ranks, "processes on this machine; 1 without it");
  command
      ->add_option("--max-restarts", words->max_restarts,
                   "restarts after a fault; bad input and signals end the job at once")
      ->check(CLI::Range(0, 1000000))
      ->capture_default_str();
  command->add_option("--timeout", words->timeout, "seconds that a rank is waited for: mesh.timeout_seconds of the recipe")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--backoff", words->backoff,
                   "seconds before the first restart; each further one waits twice as long, a minute at most")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("command", words->command, "-- train RECIPE [key.path=value ...]")->required();
  command->footer("Exit codes: those of `capstan train`.");
  command->callback([words, &program] { program.exit_code = launch_job(*words, program.executable); });
}

}  // namespace capstan::program
