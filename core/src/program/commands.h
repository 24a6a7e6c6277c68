// defines: one function for each subcommand of the program; each adds its CLI11 subcommand to `app`.
// The work happens in the callback: it throws Error (exit code 2 for Fault::input, else 1) or sets exit_code.
#pragma once
#include <string>
#include <vector>

namespace CLI { class App; }

namespace capstan::launch { struct Job; }

namespace capstan::program {

struct Program {
  std::string executable;  ///< absolute path of this program
  int exit_code = 0;
};

void add_train(CLI::App& app, Program& program);
void add_launch(CLI::App& app, Program& program);
void add_generate(CLI::App& app, Program& program);
void add_recipe(CLI::App& app, Program& program);      // recipe show|check
void add_plugin(CLI::App& app, Program& program);      // plugin list|info|new
void add_data(CLI::App& app, Program& program);        // data build|info
void add_checkpoint(CLI::App& app, Program& program);  // checkpoint info|verify
void add_bench(CLI::App& app, Program& program);
void add_bench_gpu(CLI::App& bench, Program& program);  // bench gpu

/// `train RECIPE overrides...` over ranks of this machine.
launch::Job training_job(const std::string& executable, int ranks, const std::string& recipe, const std::vector<std::string>& overrides);

}  // namespace capstan::program
