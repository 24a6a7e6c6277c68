// Opening a run: data, folder, resume, rollback, and the header on the terminal.
#include "base/look.h"
#include "base/short_bytes.h"
#include "checkpoint/loader.h"
#include "checkpoint/run_state.h"
#include "data/build.h"
#include "train/machine.h"
#include "train/precision.h"
#include "train/state_tensors.h"
#include "train/trainer.h"

#include <fmt/format.h>

#include <numeric>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <functional>

namespace capstan::train {

using std::chrono::steady_clock;
using namespace terminal;

namespace {

/// The run's folder, after what needs no data is seen to be right: a run that is refused builds no data sets and
/// leaves no folder.
std::string checked_folder(const Session& session) {
  check_lengths(session);
  const std::vector<Options>& sets = session.options().group("data").groups("sets");
  for (std::size_t i = 0; i < sets.size(); ++i)
    if (const SetProblem problem = problem_of_set(sets[i], std::span(sets).first(i)); !problem.key.empty()) sets[i].refuse(problem.key, problem.what);
  const Options& run = session.options().group("run");
  const std::string& mode = run.text("resume");
  std::string folder = session.run_folder();
  const bool held = RunFolder::has_checkpoints(folder);
  if (mode == "never" && held)
    run.refuse("resume", folder + " has checkpoints already: choose another run.dir, or run.resume=auto to go on with them");
  if (mode == "require" && !held) run.refuse("resume", folder + " has no checkpoint to go on from");
  return folder;
}

/// Builds the sets that do not exist yet and say what text they come from. A signal ends it: what is built stays, of the set at
/// hand nothing does.
void build_missing_sets(const Session& session, Display& display, const std::function<int()>& interrupted) {
  const auto end_if_asked = [&](const std::string& prefix, const char* left) {
    const int signal = interrupted();
    if (signal == 0) return;
    display.done();
    throw Interrupted(Fault::runtime, fmt::format("[{}] stopped by {} {}; the same command starts again", prefix, signal == SIGINT ? "SIGINT" : signal == SIGTERM ? "SIGTERM" : "a signal", left));
  };
  for (const Options& set : session.options().group("data").groups("sets")) {
    const std::string& prefix = set.path("path");
    if (is_there(prefix + ".idx")) continue;
    data::BuildOptions build;
    build.inputs = set.texts("text");
    build.prefix = prefix;
    build.tokenizer = session.tokenizer;
    build.max_bytes = set.integer("max_bytes");
    build.seed = static_cast<std::uint64_t>(session.options().group("run").integer("seed"));
    auto last = steady_clock::now();
    build.progress = [&](const data::BuildProgress& p) {
      end_if_asked(prefix, "while this dataset was built, of which nothing is left");
      if (steady_clock::now() - last < std::chrono::milliseconds(100)) return;
      last = steady_clock::now();
      display.status(fmt::format("building {}: {} of {}, {} documents", prefix, short_bytes(static_cast<double>(p.bytes)),
                                 short_bytes(static_cast<double>(p.total_bytes)), p.documents), false);
    };
    const data::BuildResult result = data::build_dataset(build);
    end_if_asked(prefix, "when this dataset was built, before any training");
    display.note(fmt::format("built {}: {} tokens in {} documents", prefix, short_count(static_cast<double>(result.tokens)), result.documents));
  }
}

data::DataOptions data_options(const Session& session) {
  const Options& options = session.options();
  const Options& d = options.group("data");
  data::DataOptions o;
  for (const Options& set : d.groups("sets")) o.sets.push_back({set.path("path"), set.number("weight")});
  o.where = [d](const std::string& name) { return d.where(name); };  // these options are called as the recipe's keys are
  o.sequence_length = d.integer("sequence_length"), o.batch_size = d.integer("batch_size");
  o.micro_batch = session.micro_batch();
  o.validation = d.number("validation"), o.attend_across_documents = d.flag("attend_across_documents");
  o.prefetch = static_cast<int>(d.integer("prefetch"));
  o.seed = static_cast<std::uint64_t>(options.group("run").integer("seed"));
  if (const std::shared_ptr<Mesh> mesh = session.mesh) {
    o.ranks = mesh->data_ranks(), o.rank = mesh->data_rank();
    o.sum_over_ranks = [mesh](double x) {
      mesh->host("replicate+shard", "control").all_reduce(&x, 1, DType::f64).wait();
      return x;
    };
  }
  return o;
}

}  // namespace

Trainer::Trainer(std::unique_ptr<Session> session, std::function<int()> interrupted)
    : session_(std::move(session)), interrupted_(std::move(interrupted)), folder_(checked_folder(*session_), session_->rank()), display_(session_->rank() == 0),
      schedule_(session_->options().group("schedule")), started_(steady_clock::now()) {
  const Options& options = session_->options();
  steps_ = options.group("train").integer("steps");
  clip_ = options.group("train").number("clip");
  const auto build = [&] { build_missing_sets(*session_, display_, interrupted_); };
  if (session_->mesh) session_->mesh->on_first_rank(build);  // the others read what it built
  else build();
  data_ = std::make_unique<data::DataSource>(data_options(*session_), data::TokenizerIdentity{std::string(session_->tokenizer->name()), session_->tokenizer->vocabulary()},
                                             session_->device);
  estimate_ = estimate_step(*session_);
  optimizer_ = session_->host->make_as<Optimizer>(options.plugin("optimizer"));
  print_header();  // all that is said of the run comes before its memory is taken
  if (!session_->engine) place(*session_, Placement::gradients);
  session_->engine->attach(optimizer_);
  queued_ = session_->engine->cannot_queue().empty();
  const std::string cannot = session_->engine->cannot_record();
  if (!cannot.empty() && session_->engine->options().recording == Recording::required)
    options.group("run").refuse("cuda_graphs", "steps cannot be recorded: " + cannot + "; expected auto or off here");
  if (options.group("run").text("attention_backward") == "free")
    display_.note(session_->device->kind() == DeviceKind::cuda ? "  attention: its gradients are summed in any order, with other bits at every run"
                                                               : "  attention: its gradients are summed in one order, the CPU's only one");
  if (!session_->products.empty()) display_.note("  products: " + session_->products);
  if (session_->device->kind() == DeviceKind::cuda)
    display_.note("  cuda graphs: " + (session_->engine->options().recording == Recording::off ? "off" : !cannot.empty() ? "off: " + cannot : session_->mesh ? "forward and backward are recorded once and replayed" : "forward, backward and update are recorded once and replayed"));

  const Options& c = options.group("checkpoint");
  checkpoint::SaverOptions saver;
  if (session_->mesh) {
    std::vector<int> all(static_cast<std::size_t>(session_->world->size()));
    std::iota(all.begin(), all.end(), 0);
    saver.writers = session_->world->make("checkpoint", std::move(all));
  }
  saver.keep = static_cast<int>(c.integer("keep")), saver.asynchronous = c.flag("asynchronous");
  saver_ = std::make_unique<checkpoint::Saver>(folder_.checkpoints(), session_->host->make_as<CheckpointFormat>(c.plugin("format")), saver);
  resume();
  if (saves_from_a_copy(options)) {
    std::vector<std::int64_t> bytes;
    for (const NamedTensor& t : session_->engine->tensors(true, true)) bytes.push_back(t.value.bytes());
    saver_->reserve(bytes);
  }
  cursor_ = data_->cursor();
  last_save_ = steady_clock::now();
}

Trainer::~Trainer() = default;

/// The newest good checkpoint into the engine, on all ranks the same one; nothing when there is none.
std::optional<checkpoint::Loaded> Trainer::load(checkpoint::OnDamage on_damage, const std::function<void(const std::string&)>& report) {
  const std::vector<NamedTensor> tensors = session_->engine->tensors(true);
  checkpoint::LoadOptions options;
  options.elsewhere = session_->engine->names(true);
  auto loaded = checkpoint::load_newest(folder_.checkpoints(), wanted_tensors(tensors), format_maker(*session_->host), on_damage, report, options);
  if (session_->mesh) {  // all ranks read the same files: they came to the same step, or one of them reads badly
    std::int64_t steps[2] = {loaded ? loaded->step : -1, loaded ? -loaded->step : 1};
    session_->mesh->host("pp+replicate+shard+context+tensor", "control").all_reduce(steps, 2, DType::i64, Reduction::max).wait();
    if (steps[0] != -steps[1])
      fail(Fault::runtime, folder_.checkpoints(), fmt::format("ranks read different checkpoints, of steps {} to {}: is the folder on a file system that every host "
                                                              "shares? Some rank's log names what is damaged", -steps[1], steps[0]));
  }
  if (!loaded) return loaded;
  session_->engine->publish();
  checked_step_ = -1;
  return loaded;
}

void Trainer::resume() {
  const Options& run = session_->options().group("run");
  const std::string& mode = run.text("resume");
  const auto report = [&](const std::string& line) {
    display_.warn(line);
    folder_.log(line);
  };
  std::optional<checkpoint::Loaded> loaded;
  if (mode != "never")
    loaded = load(session_->options().group("checkpoint").text("on_damage") == "stop" ? checkpoint::OnDamage::stop : checkpoint::OnDamage::fall_back, report);
  if (!loaded) {
    if (mode == "require") run.refuse("resume", folder_.path() + " has no checkpoint to go on from");
    session_->engine->initialize();
  } else {
    const auto state = checkpoint::RunState::parse(loaded->state_json, loaded->folder.string());
    if (state.seed != static_cast<std::uint64_t>(run.integer("seed")))
      run.refuse("seed", "the run in " + folder_.path() + " was started with seed " + std::to_string(state.seed) + ": keep it, or choose another run.dir");
    if (state.step > steps_)
      session_->options().group("train").refuse("steps", fmt::format("the run in {} is at step {} already, past the last of {}: ask for more steps, or choose another run.dir",
                                                                     folder_.path(), state.step, steps_));
    step_ = state.step, tokens_ = state.tokens, saved_step_ = state.step;
    const std::string where = loaded->folder.string();
    data_->seek(data::DataCursor::from_json(state.data_cursor, where), where);
    if (const auto it = state.more.find("spikes"); it != state.more.end())
      std::sscanf(it->second.c_str(), "%lf %lf %ld", &spike_mean_, &spike_square_, &spike_count_);
    const bool drifts = session_->device->kind() == DeviceKind::cuda && run.text("attention_backward") == "free";
    display_.note(fmt::format("resuming {} at step {} of {}{}", folder_.path(), step_, steps_, drifts ? ", not to the bit (run.attention_backward: free)" : ""));
    if (state.recipe_digest != recipe_digest(session_->kept_options()))
      report("the recipe differs from the one that this run has had so far" + folder_.keep_recipe(step_));
  }
  folder_.rewind_metrics(step_);  // first: where the metrics cannot be read the run stops and replaces nothing
  folder_.write_recipe(to_yaml(session_->kept_options()));
  folder_.log(fmt::format("{} at step {}", loaded ? "resumed" : "started", step_));
}

void Trainer::roll_back(const std::string& why) {
  saver_->wait();
  poll_saver();  // while saved_step_ still says which step the error is of
  const data::DataCursor after = cursor_;  // the batch that did it stays behind us
  const auto loaded = load(checkpoint::OnDamage::fall_back, [&](const std::string& line) { display_.warn(line); });
  if (!loaded) fail(Fault::runtime, "train", why + "; there is no checkpoint to roll back to: set checkpoint.every_steps, or lower optimizer.lr");
  const auto state = checkpoint::RunState::parse(loaded->state_json, loaded->folder.string());
  data_->seek(after);
  fetched_.clear();
  step_ = state.step, tokens_ = state.tokens, saved_step_ = state.step;
  try {
    folder_.rewind_metrics(step_);
  } catch (const Error& e) {  // lines too many are no reason to lose the run
    const std::string line = fmt::format("{}. metrics.jsonl keeps its lines of steps after {}, which are taken again, and this does not end the run", e.what(), step_);
    display_.warn(line);
    folder_.log(line);
  }
  display_.warn(why + fmt::format("; rolled back to step {} and past the batch", step_));
}

void Trainer::print_header() {
  const Options& options = session_->options();
  const Options& d = options.group("data");
  const ProductRate products = measure_products(*session_, estimate_);
  peak_ = products.rate;
  if (session_->mesh) session_->mesh->host("pp+replicate+shard+context+tensor", "control").all_reduce(&peak_, 1, DType::f64).wait();
  const double tokens = static_cast<double>(steps_) * static_cast<double>(d.integer("batch_size") * d.integer("sequence_length"));
  const double step_seconds = estimate_.step_flop / (0.8 * peak_);
  std::vector<std::pair<std::string, std::string>> rows{
                   {"model", session_->model->describe()},
                   {"parameters", short_count(static_cast<double>(estimate_.parameters)) + ", " + describe_precision(*session_)},
                   {"data", data_->describe()},
                   {"training", fmt::format("{} steps of {} x {} tokens, {} tokens in all ({:.1f} epochs)", steps_, d.integer("batch_size"), d.integer("sequence_length"),
                                            short_count(tokens), tokens / static_cast<double>(std::max<std::int64_t>(1, data_->train_tokens())))},
                   {"optimizer", fmt::format("{}, peak learning rate {:g}, {} decay after {} steps of warm-up", options.plugin("optimizer").name, optimizer_->peak_lr(),
                                             options.group("schedule").text("decay"), options.group("schedule").integer("warmup"))},
                   {"machine", describe_machine(*session_->device) + fmt::format(", {:.0f} GFLOP/s in matrix products{}", peak_ * 1e-9, products.what)},
                   {"memory", describe_memory(estimate_, session_->mesh != nullptr)},
                   {"estimate", fmt::format("{:.3g} GFLOP a step, about {}", estimate_.step_flop * 1e-9, short_time(step_seconds * static_cast<double>(steps_)))},
                   {"run", folder_.path()}};
  if (session_->mesh) {
    const auto machine = std::find_if(rows.begin(), rows.end(), [](const auto& row) { return row.first == "machine"; });
    machine->second += " over all ranks, " + std::to_string(session_->world->local_size()) + " on this host";
    const std::string gpus = session_->communication.empty() ? "" : "; GPUs reach each other " + session_->communication;
    rows.insert(machine, {"mesh", session_->mesh->layout().describe() + ", " + options.group("mesh").text("strategy") + gpus});
  }
  display_.header("capstan train " + session_->recipe.path, rows);
  if (session_->device->kind() == DeviceKind::cpu && !session_->mesh) check_memory(*session_, estimate_, [&](const std::string& line) { display_.warn(line); });
}

}  // namespace capstan::train
