// `capstan generate RUN --prompt TEXT`: continues texts with the weights of a run's checkpoint.
#include "base/look.h"
#include "program/commands.h"
#include "program/seed.h"
#include "train/session.h"

#include <capstan/inference.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace capstan::program {

namespace {

struct GenerateOptions {
  std::string run, prompt, prompt_file;
  std::vector<std::string> overrides;
  SamplingParams sampling;
  std::int64_t count = 1, step = -1;
};

std::string read_prompt(const GenerateOptions& o) {
  if (o.prompt_file.empty()) return o.prompt;
  std::string text;
  if (o.prompt_file == "-") {
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
  } else {
    std::ifstream file(o.prompt_file, std::ios::binary);
    if (!file || is_folder(o.prompt_file)) {
      fail(Fault::input, o.prompt_file, "the prompt cannot be read: expected a readable file, or - for standard input");
    }
    text.assign(std::istreambuf_iterator<char>(file), {});
  }
  return text;
}

void write(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    fail(Fault::runtime, "standard output", "the text cannot be written");
  }
}

std::string ending(const Completion& c) {
  if (c.finish == "length") return "ended by its length";
  if (c.finish == "stop") return "ended by a stop text";
  if (c.finish == "end_of_document") return "the document ended";
  return c.finish;
}

/// "top_k" -> "--top-k"
std::string option_of(std::string parameter) {
  std::replace(parameter.begin(), parameter.end(), '_', '-');
  return "--" + parameter;
}

/// One completion is shown as it grows. Of several, each is shown whole, in order.
void generate(const GenerateOptions& o, const std::string& executable) {
  check_sampling(o.sampling, option_of);  // by the engine's rules, before anything is read
  const std::filesystem::path folder = o.run;
  if (!is_there(folder / "recipe.yaml")) {
    fail(Fault::input, o.run,
         "this is no run folder: expected one that `capstan train` wrote, with recipe.yaml and checkpoints/");
  }
  const std::unique_ptr<train::Session> session =
      train::open_session((folder / "recipe.yaml").string(), o.overrides, executable, train::Placement::weights);
  const std::string prompt = read_prompt(o);
  Request request;
  session->tokenizer->encode(prompt, request.prompt);
  if (request.prompt.empty()) {
    const std::int32_t end = session->tokenizer->end_of_document();
    if (end < 0)
      fail(Fault::input, "--prompt", "the prompt is empty, and this tokenizer has no token to begin a document with");
    request.prompt.push_back(end);
  }
  request.sampling = o.sampling;
  const auto report = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  const std::int64_t step = train::load_weights(*session, o.run, o.step, report);
  fmt::print(stderr, "{}, weights of step {}\n", session->model->describe(), step);

  const auto engine = session->host->make_as<InferenceEngine>(session->options().plugin("inference"));
  engine->attach(session->model, session->tokenizer, session->device, session->engine->options().compute,
                 static_cast<std::uint64_t>(step));
  for (request.id = 0; request.id < o.count; ++request.id) engine->submit(request);
  const auto start = std::chrono::steady_clock::now();
  std::map<std::int64_t, Completion> done;
  std::int64_t shown = 0, tokens = 0;
  if (o.count == 1) write(prompt);
  for (bool more = true; more;) {
    more = engine->step([&](std::int64_t, const std::string& text) {
      if (o.count == 1) write(text);
    });
    for (Completion& c : engine->finished()) {
      tokens += static_cast<std::int64_t>(c.tokens.size());
      done[c.id] = std::move(c);
    }
    for (auto it = done.find(shown); o.count > 1 && it != done.end(); it = done.find(++shown)) {
      write(fmt::format("--- {} of {} ({})\n{}{}\n", shown + 1, o.count, ending(it->second), prompt, it->second.text));
    }
  }
  if (o.count == 1) write("\n");
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print(stderr, "{} tokens, {:.1f} tokens/s{}\n", tokens, static_cast<double>(tokens) / std::max(seconds, 1e-9),
             o.count == 1 ? ", " + ending(done.at(0)) : "");
}

}  // namespace

void add_generate(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand("generate", "Continue a text with the weights of a run");
  auto o = std::make_shared<GenerateOptions>();
  // What reads well from a small model; the samples during training are drawn the same way.
  o->sampling.temperature = 0.8;
  o->sampling.top_p = 0.95;
  command->add_option("run", o->run, "run folder: its recipe.yaml and newest good checkpoint are used")->required();
  command->add_option("overrides", o->overrides, "key.path=value: beats the run's recipe, run.threads=1 for instance");
  auto* prompt = command->add_option("--prompt", o->prompt, "text to continue; empty: a new document");
  command->add_option("--prompt-file", o->prompt_file, "file that holds the prompt; - is standard input")->excludes(prompt);
  command->add_option("--temperature", o->sampling.temperature, "divides the logits; 0: always the likeliest token")
      ->capture_default_str();
  command->add_option("--top-k", o->sampling.top_k, "sample among the k likeliest tokens; 0: all")
      ->capture_default_str();
  command->add_option("--top-p", o->sampling.top_p, "sample among the likeliest tokens that together reach this probability")
      ->capture_default_str();
  command->add_option("--min-p", o->sampling.min_p, "drop tokens less likely than this share of the likeliest")
      ->capture_default_str();
  command->add_option("--seed", o->sampling.seed, "the same seed gives the same text")->check(check_seed)->capture_default_str();
  command->add_option("--max-tokens", o->sampling.max_tokens, "longest completion")
      ->capture_default_str();
  command
      ->add_option("--stop", o->sampling.stop, "text that ends the completion and is not shown; may be given several times")
      ->allow_extra_args(false);
  command->add_option("--count", o->count, "how many completions")->check(CLI::Range(1, 10000))->capture_default_str();
  command->add_option("--step", o->step, "use the checkpoint of this step instead of the newest good one")
      ->check(CLI::NonNegativeNumber);
  command->footer(
      "The text goes to standard output, everything else to standard error.\n"
      "Exit codes: 0 done, 2 bad input, 1 anything else.");
  command->callback([o, &program] { generate(*o, program.executable); });
}

}  // namespace capstan::program
