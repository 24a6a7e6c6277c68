// `capstan bench RECIPE`: the speed of a recipe's training step on this machine, against the machine's limit. `bench gpu`
// is a command of its own below it.
#include "program/commands.h"

#include "bench/op_table.h"
#include "train/estimate.h"
#include "train/machine.h"
#include "train/precision.h"
#include "train/session.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan::program {

namespace {

struct Words {
  std::string recipe;
  std::vector<std::string> overrides;
  int steps = 8, warmup = 2;
  bool profile = false, json = false;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

/// Random tokens of the recipe's shapes: speed does not depend on what they say.
std::vector<Batch> random_step(Device& device, const Options& data, std::int64_t vocabulary) {
  const std::int64_t length = data.integer("sequence_length"), samples = data.integer("batch_size");
  const std::int64_t micro = data.integer("micro_batch") > 0 ? data.integer("micro_batch") : samples;
  const Rng rng(1, "bench/tokens");
  std::vector<Batch> batches;
  for (std::int64_t first = 0; first < samples; first += micro) {
    const std::int64_t count = std::min(micro, samples - first), rows = count * length;
    std::vector<std::int32_t> tokens, targets, lengths(static_cast<std::size_t>(count), static_cast<std::int32_t>(length));
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto at = static_cast<std::uint64_t>(first * length + i);
      tokens.push_back(static_cast<std::int32_t>(rng.below(at, static_cast<std::uint64_t>(vocabulary))));
      targets.push_back(static_cast<std::int32_t>(rng.below(at + 1, static_cast<std::uint64_t>(vocabulary))));
    }
    batches.push_back(make_batch(device, tokens, lengths, targets, {}, first * length));
    batches.back().step_weight = static_cast<double>(samples * length);
  }
  return batches;
}

/// What steps took that were asked for one ahead of their results.
struct Ahead {
  std::vector<double> whole, host;  ///< seconds a step: from end to end, and of the host asking for it
  double held = 0;                  ///< seconds a step when all of it was asked for before it began
  double busy = 0;                  ///< held as a share of the mean of whole, 1 at most: the GPU's time that waits for nothing
  std::int64_t recorded = 0;
};

Ahead steps_ahead(Engine& engine, const std::vector<Batch>& batches, const Words& words, double clip) {
  const std::span<const Batch> all(batches);
  std::int64_t step = 0;
  for (; step < std::max(2, words.warmup); ++step) engine.collect(engine.queue_step(all, step + 1, 1.0, clip));  // the second is recorded
  StepQueue& queue = *engine.queued();
  Ahead a;
  std::optional<QueuedStep> before = engine.queue_step(all, ++step, 1.0, clip);  // so that the first that counts is behind one too
  std::vector<std::int64_t> marks{queue.mark()};  // at each step's end two: one for each of the spans that meet there
  for (int i = 0; i < words.steps; ++i, ++step) {
    const double t0 = now();
    const QueuedStep next = engine.queue_step(all, step + 1, 1.0, clip);
    a.host.push_back(now() - t0);
    marks.push_back(queue.mark()), marks.push_back(queue.mark());
    if (before) engine.collect(*before);
    before = next;
  }
  if (before) engine.collect(*before);
  double all_of_them = 0;
  for (std::size_t i = 0; i + 1 < marks.size(); i += 2) a.whole.push_back(queue.seconds(marks[i], marks[i + 1])), all_of_them += a.whole.back();
  // The same steps with the stream held until all of their work is asked for: what the host, or a wait inside of a step, adds to
  // the steps above is not in them. The hold gives way by itself where more is asked for than a stream takes.
  constexpr int groups = 3, together = 2;
  const double most = 0.05 + 4 * together * median(a.host);
  for (int g = 0; g < groups; ++g) {
    queue.hold(most);
    const std::int64_t begin = queue.mark();
    std::vector<QueuedStep> asked;
    for (int i = 0; i < together; ++i, ++step) asked.push_back(engine.queue_step(all, step + 1, 1.0, clip));
    const std::int64_t end = queue.mark();
    queue.release();
    for (const QueuedStep& one : asked) engine.collect(one);
    a.held += queue.seconds(begin, end) / (groups * together);
  }
  a.busy = std::min(1.0, a.held * static_cast<double>(a.whole.size()) / all_of_them);
  a.recorded = queue.recorded();
  return a;
}

void bench(const Program& program, const Words& words) {
  const auto session = train::open_session(words.recipe, words.overrides, program.executable, train::Placement::gradients);
  Engine& engine = *session->engine;
  Device& device = *session->device;
  const train::Estimate estimate = train::estimate_step(*session);
  engine.attach(session->host->make_as<Optimizer>(session->options().plugin("optimizer")));
  engine.initialize();
  const std::vector<Batch> batches = random_step(device, session->options().group("data"), session->model->vocabulary());
  double tokens = 0;
  for (const Batch& b : batches) tokens += static_cast<double>(b.space().capacity);
  const double clip = session->options().group("train").number("clip");
  std::vector<double> whole, gradients, updates, rates;
  std::string products;
  const auto measure = [&] {
    const train::ProductRate limit = train::measure_products(*session, estimate);
    rates.push_back(limit.rate), products = limit.what;
  };
  // A GPU's steps as a run asks for them, one ahead of its result; by op each has to be waited for.
  std::optional<Ahead> ahead;
  if (engine.cannot_queue().empty() && !words.profile) {
    measure();
    ahead = steps_ahead(engine, batches, words, clip);
    measure();
    whole = ahead->whole;
  }
  const double empty_scope = words.profile ? bench::empty_scope_seconds(device) : 0;
  for (int step = 1; !ahead && step <= words.warmup + words.steps; ++step) {
    if (step == words.warmup + 1 && words.profile) device.record(true, true);
    measure();
    const double t0 = now();
    engine.forward_backward(std::span<const Batch>(batches), static_cast<std::uint64_t>(step));
    device.synchronize();
    const double t1 = now();
    engine.update(step, 1.0, clip > 0 ? engine.gradient_norm() : 0, clip);
    device.synchronize();
    const double t2 = now();
    if (step > words.warmup) whole.push_back(t2 - t0), gradients.push_back(t1 - t0), updates.push_back(t2 - t1);
  }
  const double seconds = median(whole), peak = median(rates), rate = estimate.step_flop / seconds;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  if (words.json) {
    nlohmann::ordered_json j{{"engine", std::string("capstan ") + CAPSTAN_VERSION},
                             {"recipe", words.recipe},
                             {"threads", train::thread_count(device)},
                             {"tokens_per_s", tokens / seconds},
                             {"best_tokens_per_s", tokens / *std::min_element(whole.begin(), whole.end())},
                             {"forward_backward_ms", ahead ? nlohmann::ordered_json() : nlohmann::ordered_json(1e3 * median(gradients))},
                             {"optimizer_ms", ahead ? nlohmann::ordered_json() : nlohmann::ordered_json(1e3 * median(updates))},
                             {"flops", rate},
                             {"gemm_flops", peak},
                             {"peak_share", rate / peak},
                             {"precision", train::describe_precision(*session)},
                             {"peak_rss_mib", usage.ru_maxrss / 1024},
                             {"tensor_peak_mib", device.bytes_peak() >> 20},
                             {"reserved_mib", device.bytes_reserved() >> 20},
                             {"recipe_options", nlohmann::ordered_json::parse(to_json(session->options()))}};
    if (ahead) j["host_ms"] = 1e3 * median(ahead->host), j["held_ms"] = 1e3 * ahead->held, j["busy_share"] = ahead->busy, j["recorded"] = ahead->recorded;
    fmt::print("{}\n", j.dump());
  } else {
    fmt::print("{}\n", session->model->describe());
    fmt::print("{}\n", train::describe_machine(device));
    fmt::print("  step          {:.1f} ms (best {:.1f}): {:.0f} tokens/s\n", 1e3 * seconds, 1e3 * *std::min_element(whole.begin(), whole.end()), tokens / seconds);
    if (ahead)
      fmt::print("  host          {:.2f} ms to ask for a step ({}); asked for before it begins, it takes the GPU {:.2f} ms: busy {:.1f}% of the time\n", 1e3 * median(ahead->host),
                 ahead->recorded > 0 ? fmt::format("{} kinds of microbatches recorded", ahead->recorded) : "nothing recorded", 1e3 * ahead->held, 100 * ahead->busy);
    else
      fmt::print("  gradients     {:.1f} ms, optimizer {:.1f} ms\n", 1e3 * median(gradients), 1e3 * median(updates));
    if (!session->products.empty()) fmt::print("  products      {}\n", session->products);
    if (device.kind() == DeviceKind::cuda && session->options().group("run").text("attention_backward") == "free") fmt::print("  attention     its gradients are summed in any order\n");
    fmt::print("  precision     {}\n", train::describe_precision(*session));
    fmt::print("  matrix rate   {:.0f} GFLOP/s, measured between the steps{}: the limit\n", peak * 1e-9, products);
    fmt::print("  reached       {:.0f} GFLOP/s, {:.1f}% of the limit\n", rate * 1e-9, 100 * rate / peak);
    fmt::print("  memory        {} MiB resident at most, {} MiB in tensors\n", usage.ru_maxrss / 1024, device.bytes_peak() >> 20);
  }
  if (!words.profile) return;
  double total = 0;
  for (double s : whole) total += s;
  fmt::print("{}", bench::op_table(device.ledger(), words.steps, total, empty_scope));
}

}  // namespace

void add_bench(CLI::App& app, Program& program) {
  CLI::App* command = app.add_subcommand("bench", "Measure a recipe's training step on random tokens against the matrix rate of this machine");
  auto words = std::make_shared<Words>();
  command->add_option("file", words->recipe, "a recipe (YAML); or the word gpu: everything that a GPU does, see bench gpu --help");
  command->add_option("overrides", words->overrides, "key.path=value");
  command->add_option("--steps", words->steps, "steps that count")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--warmup", words->warmup, "steps before them")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_flag("--profile", words->profile, "time each op");
  command->add_flag("--json", words->json, "one JSON line");
  add_bench_gpu(*command, program);
  command->callback([words, command, &program] {
    if (!command->get_subcommands().empty()) return;
    if (words->recipe.empty()) fail(Fault::input, "command line", "bench: expected a recipe (a YAML file), or the word gpu");
    bench(program, *words);
  });
}

}  // namespace capstan::program
