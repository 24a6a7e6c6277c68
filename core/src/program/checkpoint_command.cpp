// `capstan checkpoint info|verify`: what a run's checkpoints hold, and whether they are whole.
#include "base/look.h"
#include "base/short_bytes.h"
#include "checkpoint/loader.h"
#include "checkpoint/run_state.h"
#include "program/commands.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace capstan::program {
namespace {

namespace fs = std::filesystem;
using checkpoint::Candidate;
using checkpoint::Path;

struct Words {
  std::string path;
  bool tensors = false;
};

/// The checkpoints that PATH stands for, newest first: a run's folder, its checkpoints/, or one step in it.
std::vector<Candidate> chosen(const std::string& text) {
  if (text.empty()) fail(Fault::input, "command line", "expected a run's folder, got an empty path");
  const auto path = fs::absolute(text).lexically_normal();
  if (!is_there(path)) fail(Fault::input, path.string(), "no such run or checkpoint");
  // A step's folder may have been renamed by its user; its manifest makes it a checkpoint.
  if (is_there(path / checkpoint::manifest_name)) return {{checkpoint::read_manifest(path).step, path}};
  const auto name = (path.filename().empty() ? path.parent_path() : path).filename().string();
  if (const auto step = checkpoint::step_of(name)) return {{*step, path}};
  const auto root = is_folder(path / "checkpoints") ? path / "checkpoints" : path;
  const auto all =
      checkpoint::candidates(root, [](const std::string& warning) { fmt::print(stderr, "warning: {}\n", warning); });
  if (all.empty())
    fail(Fault::input, path.string(), "there are no checkpoints here; give a run's folder or a step_... folder in it");
  return all;
}

void print_one(const Candidate& candidate, bool tensors) {
  const auto manifest = checkpoint::read_manifest(candidate.folder);
  std::int64_t elements = 0, payload = 0;
  std::size_t width = 6;
  for (const auto& [name, tensor] : manifest.tensors) {
    elements += *checkpoint::volume(tensor.global_shape);
    for (const auto& box : tensor.boxes) payload += box.bytes;
    width = std::max(width, name.size());
  }
  fmt::print("step {}  {}\n", manifest.step, candidate.folder.string());
  fmt::print("  format:   {}, version {}, written by Capstan {}\n", manifest.format, checkpoint::format_version,
             manifest.program);
  fmt::print("  size:     {} in {} files\n", short_bytes(static_cast<double>(manifest.bytes())), manifest.files.size() + 1);
  fmt::print("  tensors:  {} ({} elements, {})\n", manifest.tensors.size(), elements, short_bytes(static_cast<double>(payload)));
  try {
    const auto text = checkpoint::read_state(candidate.folder);
    const auto state = checkpoint::RunState::parse(text, (candidate.folder / checkpoint::state_name).string());
    fmt::print("  run:      {} tokens trained on, seed {}, recipe {}\n", state.tokens, state.seed,
               state.recipe_digest.empty() ? "without a digest" : state.recipe_digest);
    fmt::print("  data:     {}\n", state.data_cursor.empty() ? "no cursor" : state.data_cursor);
    std::string plugins;
    for (const auto& p : state.plugins)
      plugins += fmt::format("{}{}/{} {}", plugins.empty() ? "" : ", ", p.kind, p.name, p.version);
    fmt::print("  plugins:  {}\n", plugins.empty() ? "none recorded" : plugins);
  } catch (const Error& e) {  // what can be told has been told; `verify` says all
    fmt::print("  run:      unreadable: {}\n", e.what());
  }
  if (!tensors) return;
  fmt::print("  {:<{}}  {:<7}  {}\n", "TENSOR", width, "TYPE", "SHAPE");
  for (const auto& [name, tensor] : manifest.tensors) {
    fmt::print("  {:<{}}  {:<7}  {}", name, width, name_of(tensor.dtype), checkpoint::text_of(tensor.global_shape));
    fmt::print("{}\n", tensor.boxes.size() > 1 ? fmt::format(" in {} boxes", tensor.boxes.size()) : "");
  }
}

void info(const Words& words) {
  bool first = true;
  for (const auto& candidate : chosen(words.path)) {
    if (!first) fmt::print("\n");
    first = false;
    try {
      print_one(candidate, words.tensors);
    } catch (const checkpoint::Unreadable& e) {
      fmt::print("step {}  {}\n  cannot be read:  {}\n", candidate.step, candidate.folder.string(), e.what());
    } catch (const Error& e) {
      fmt::print("step {}  {}\n  damaged:  {}\n", candidate.step, candidate.folder.string(), e.what());
    }
  }
}

void verify(Program& program, const Words& words) {
  int damaged = 0, unreadable = 0, count = 0;
  bool forbidden = false;
  for (const auto& candidate : chosen(words.path)) {
    ++count;
    const auto problems = checkpoint::verify(candidate.folder);
    const auto any = [&](const auto& is) { return std::any_of(problems.begin(), problems.end(), is); };
    const bool bad = any([](const auto& p) { return p.fatal && !p.unreadable; });
    const bool unread = !bad && any([](const auto& p) { return p.fatal && p.unreadable; });
    damaged += bad, unreadable += unread;
    forbidden |= any([](const auto& p) { return p.fatal && p.unreadable == Fault::input; });
    fmt::print("step {}: {}\n", candidate.step, problems.empty() ? "good" : bad ? "DAMAGED" : unread ? "CANNOT BE READ" : "good, but");
    for (const auto& problem : problems) fmt::print("  {}\n", problem.text);
  }
  if (damaged > 0) fmt::print("{} of {} checkpoints damaged\n", damaged, count);
  if (unreadable > 0) fmt::print("{} of {} checkpoints cannot be read; what they hold may be good\n", unreadable, count);
  if (damaged + unreadable > 0) program.exit_code = damaged > 0 || forbidden ? 2 : 1;
}

}  // namespace

void add_checkpoint(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand("checkpoint", "Look at the checkpoints of a run and check that they are whole");
  command->require_subcommand(1);
  const auto words = std::make_shared<Words>();

  CLI::App* info_command = command->add_subcommand("info", "Steps, sizes, tensors and what else a checkpoint holds");
  info_command->add_option("path", words->path, "a run's folder, or one step_... folder in it")->required();
  info_command->add_flag("--tensors", words->tensors, "list every tensor with its type and global shape");
  info_command->callback([words] { info(*words); });

  CLI::App* verify_command =
      command->add_subcommand("verify", "Compare every byte with its checksum; exit code 2 when one differs or may not be read, 1 when the disk fails");
  verify_command->add_option("path", words->path, "a run's folder, or one step_... folder in it")->required();
  verify_command->callback([words, &program] { verify(program, *words); });
}

}  // namespace capstan::program
