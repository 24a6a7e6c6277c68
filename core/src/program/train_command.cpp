// `capstan train RECIPE [key.path=value ...]`
#include "program/commands.h"

#include "train/trainer.h"

#include <CLI/CLI.hpp>

#include <csignal>
#include <memory>
#include <string>
#include <vector>

namespace capstan::program {

namespace {

// A signal handler can reach nothing but a static: it holds the last signal's number.
volatile std::sig_atomic_t pending_signal = 0;

extern "C" void on_signal(int number) {
  pending_signal = number;
  std::signal(SIGINT, SIG_DFL);  // a second one, of either kind, ends the program at once
  std::signal(SIGTERM, SIG_DFL);
}

}  // namespace

void add_train(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand("train", "Train what a recipe describes; the same command resumes it");
  auto recipe = std::make_shared<std::string>();
  auto overrides = std::make_shared<std::vector<std::string>>();
  command->add_option("recipe", *recipe, "YAML file (see recipes/ and `capstan recipe keys`)")->required();
  command->add_option("overrides", *overrides, "key.path=value: beats the recipe, run.dir=PATH for instance");
  command->footer("SIGINT and SIGTERM finish the step, save a checkpoint and stop; a second one stops at once.\n"
                  "Exit codes: 0 done, 2 bad input, 1 anything else (stopped by a signal included).");
  command->callback([recipe, overrides, &program] {
    std::signal(SIGINT, on_signal);
    std::signal(SIGTERM, on_signal);
    train::Trainer trainer(train::open_session(*recipe, *overrides, program.executable, train::Placement::gradients), [] { return static_cast<int>(pending_signal); });
    if (trainer.run() != 0) program.exit_code = 1;
  });
}

}  // namespace capstan::program
