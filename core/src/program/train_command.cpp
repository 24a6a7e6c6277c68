// `capstan train RECIPE [key.path=value ...] [--ranks N]`
#include "launch/supervise.h"
#include "program/commands.h"
#include "program/rank.h"

#include <CLI/CLI.hpp>

#include <sys/ioctl.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::program {

launch::Job training_job(const std::string& executable, int ranks, const std::string& recipe,
                         const std::vector<std::string>& overrides) {
  launch::Job job;
  job.executable = executable;
  job.ranks = ranks;
  job.words = {"train", "--supervised", "--ranks", std::to_string(ranks)};
  winsize size{};
  if (isatty(STDOUT_FILENO) == 1 && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
    job.words.insert(job.words.end(), {"--columns", std::to_string(size.ws_col)});
  job.words.push_back(recipe);
  job.words.insert(job.words.end(), overrides.begin(), overrides.end());
  return job;
}

void add_train(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand("train", "Train what a recipe describes; the same command resumes it");
  auto work = std::make_shared<RankWork>();
  auto ranks = std::make_shared<std::optional<int>>();
  command->add_option("recipe", work->recipe, "YAML file (see recipes/ and `capstan recipe keys`)")->required();
  command->add_option("overrides", work->overrides, "key.path=value: beats the recipe, run.dir=PATH for instance");
  command->add_option("--ranks", *ranks,
                      "processes that share the work as the recipe's mesh says; started on this machine unless mpirun, srun "
                      "or torchrun did");
  // Between a supervisor and the ranks that it starts.
  command->add_flag("--supervised", work->supervised)->group("");
  command->add_option("--columns", work->columns)->group("");
  command->footer(
      "SIGINT and SIGTERM finish the step, save a checkpoint and stop; a second one stops at once.\n"
      "Exit codes: 0 done, 2 bad input, 1 anything else (stopped by a signal included).\n"
      "Several ranks: docs/mesh.md.");
  command->callback([work, ranks, &program] {
    work->executable = program.executable;
    const launch::Launch launch = launch::Launch::detect(*ranks);
    program.exit_code = launch.bootstrap == launch::Bootstrap::spawn
                            ? launch::supervise(training_job(program.executable, launch.size, work->recipe, work->overrides))
                            : run_rank(launch, *work);
  });
}

}  // namespace capstan::program
