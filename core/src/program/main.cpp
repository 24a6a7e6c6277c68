// The program: subcommands, errors, exit codes.
#include "program/commands.h"
#include "program/ending.h"

#include <CLI/CLI.hpp>

#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>

int main(int argc, char** argv) {
  using namespace capstan;
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit then is an error of the write, which says what to do
  program::Program program;
  std::error_code error;
  program.executable = std::filesystem::read_symlink("/proc/self/exe", error).string();
  if (error) program.executable = std::filesystem::absolute(argv[0]).string();

  CLI::App app{"Capstan trains, RL-fine-tunes and serves large language models from one YAML recipe.", "capstan"};
  app.set_version_flag("--version", std::string("capstan ") + CAPSTAN_VERSION);
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::help);
  program::add_train(app, program);
  program::add_launch(app, program);
  program::add_generate(app, program);
  program::add_recipe(app, program);
  program::add_plugin(app, program);
  program::add_data(app, program);
  program::add_checkpoint(app, program);
  program::add_bench(app, program);
  try {
    app.parse(argc, argv);
    return program.exit_code;
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e);
    return code == 0 ? 0 : 2;
  } catch (...) {
    const program::Ending ending = program::ending_of(std::current_exception());
    std::fprintf(stderr, "capstan: %s\n", ending.message.c_str());
    return ending.code;
  }
}
