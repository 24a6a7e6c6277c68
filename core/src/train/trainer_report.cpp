// What happens between steps: the live line, metrics, spikes, validation, samples, checkpoints.
#include "base/short_bytes.h"
#include "checkpoint/run_state.h"
#include "data/bigram.h"
#include "train/state_tensors.h"
#include "train/trainer.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <exception>
#include <utility>

namespace capstan::train {

using std::chrono::steady_clock;
using namespace terminal;

namespace {
double seconds_since(steady_clock::time_point t) { return std::chrono::duration<double>(steady_clock::now() - t).count(); }
/// JSON has no NaN: a number that is not finite becomes its name.
nlohmann::json number(double x) {
  if (std::isfinite(x)) return x;
  return std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}
}  // namespace

std::string Trainer::metric_line(const StepResult& r) const {
  nlohmann::ordered_json j;
  j["step"] = step_, j["loss"] = number(r.loss), j["grad_norm"] = number(r.grad_norm), j["lr"] = r.lr, j["tokens"] = tokens_;
  if (!r.finite()) j["skipped"] = true;
  if (r.seconds > 0) {
    j["seconds"] = r.seconds, j["tokens_per_second"] = static_cast<double>(r.tokens) / r.seconds;
    const double rate = estimate_.model_flop_per_token * static_cast<double>(r.tokens) / r.seconds;
    j["flops"] = rate, j["peak_share"] = rate / peak_;
  }
  return j.dump();
}

void Trainer::metric(const std::string& json) {
  const std::string why = folder_.metric(json);
  if (why.empty()) return;
  display_.warn(why);
  folder_.log(why);
}

void Trainer::report(const StepResult& r) {
  run_seconds_ += r.seconds;
  ++timed_steps_;
  const double per_step = run_seconds_ / static_cast<double>(timed_steps_);
  const double rate = estimate_.model_flop_per_token * static_cast<double>(r.tokens) / r.seconds;
  const std::int64_t every = session_->options().group("train").integer("log_every");
  if (step_ % every == 0 || step_ == steps_) metric(metric_line(r));
  // Without a terminal: the first steps, then about fifty lines in all, or as train.log_every says.
  const std::int64_t stride = every > 1 ? every : std::max<std::int64_t>(1, steps_ / 50);
  const std::string begin = fmt::format("step {}/{}  loss {:.4f}{}", step_, steps_, r.loss, validation_ ? fmt::format("  val {:.4f}", *validation_) : "");
  const std::string speed = short_count(static_cast<double>(r.tokens) / r.seconds) + " tok/s", share = fmt::format("{:.0f}% of peak", 100 * rate / peak_),
                    left = short_time(per_step * static_cast<double>(steps_ - step_)) + " left";
  display_.status(fmt::format("{}  |grad| {:.2f}  lr {:.2e}  {}  {:.0f} GFLOP/s ({})  {}", begin, r.grad_norm, r.lr, speed, rate * 1e-9, share, left),
                  timed_steps_ <= 2 || step_ % stride == 0 || step_ == steps_,
                  {fmt::format("{}  |grad| {:.2f}  {}  {}  {}", begin, r.grad_norm, speed, share, left), fmt::format("{}  {}  {}", begin, speed, left),
                   fmt::format("step {}/{}  {:.4f}  {}", step_, steps_, r.loss, left)});
  watch_spikes(r);
  const StepQueue* queue = session_->engine->queued();
  if (queue != nullptr && !queue->why_not().empty() && !std::exchange(told_why_not_recorded_, true)) {
    const std::string line = "steps are not recorded from here on, with the same results: " + queue->why_not();
    display_.warn(line);
    folder_.log(line);
  }
  if (queue != nullptr && queue->differing() > 0 && !std::exchange(told_kinds_differ_, true)) {
    const std::string line = fmt::format("step {} ran unrecorded, with the same results: the ranks' batches differ in kind (rows, sequences); so will others. "
                                         "data.attend_across_documents: true makes all of one kind", step_);
    display_.note(line);
    folder_.log(line);
  }
}

void Trainer::watch_spikes(const StepResult& r) {
  const double threshold = session_->options().group("train").number("spike_threshold");
  if (spike_count_ >= 20 && threshold > 0) {
    const double deviation = std::sqrt(std::max(spike_square_ - spike_mean_ * spike_mean_, 1e-12));
    const double z = (r.loss - spike_mean_) / deviation;
    if (z > threshold) {
      const std::string line = fmt::format("step {}: loss {:.4f} is {:.1f} standard deviations above its running mean of {:.4f} (gradient norm {:.2f}, data up to sample {})",
                                           step_, r.loss, z, spike_mean_, r.grad_norm, cursor_.sample);
      display_.warn(line);
      folder_.log(line);
      nlohmann::ordered_json j;
      j["step"] = step_, j["event"] = "loss_spike", j["loss"] = r.loss, j["deviations"] = z, j["mean"] = spike_mean_;
      metric(j.dump());
      return;  // a spike does not move the mean that it is measured by
    }
  }
  const double share = 1.0 / static_cast<double>(std::min<std::int64_t>(++spike_count_, 100));
  spike_mean_ += share * (r.loss - spike_mean_);
  spike_square_ += share * (r.loss * r.loss - spike_square_);
}

void Trainer::after_step(const StepResult&) {
  const std::int64_t every = session_->options().group("mesh").integer("check_every");
  if (every > 0 && step_ % every == 0) check_replicas();
  const Options& train = session_->options().group("train");
  const Options& c = session_->options().group("checkpoint");
  const auto due = [&](std::int64_t every) { return every > 0 && step_ % every == 0; };
  if (due(train.integer("validate_every")) || (step_ == steps_ && train.integer("validate_every") > 0)) validate();
  if (due(train.integer("sample_every")) || (step_ == steps_ && train.integer("sample_every") > 0)) sample();
  if (due(c.integer("every_steps")) || save_due_) save();
  poll_saver();
}

/// Whether after_step(step) looks at the weights.
bool Trainer::due_after(std::int64_t step) const {
  const Options& train = session_->options().group("train");
  const auto due = [&](std::int64_t every) { return every > 0 && step % every == 0; };
  return due(session_->options().group("mesh").integer("check_every")) || due(train.integer("validate_every")) || due(train.integer("sample_every")) ||
         due(session_->options().group("checkpoint").integer("every_steps")) || save_due_;
}

/// Ends the job when ranks that should hold the same parameters do not.
void Trainer::check_replicas() {
  if (!session_->mesh || checked_step_ == step_) return;
  checked_step_ = step_;
  const std::string difference = session_->engine->disagreement();
  if (!difference.empty())
    fail(Fault::runtime, "train", fmt::format("step {}: {}: memory or a message was damaged. What was saved was compared before it was saved, so start "
                                              "again: the run goes on from its newest checkpoint. When it comes back, take that rank's host out",
                                              step_, difference));
}

void Trainer::validate() {
  if (data_->validation_tokens() == 0) return;
  // Batches of an optimizer step's size, however they are cut for memory and ranks.
  const std::int64_t samples = session_->options().group("train").integer("validate_batches") * data_->options().batch_size;
  double loss = 0;
  const std::vector<Batch> all = data_->validation(samples);
  for (const LossEntry& entry : session_->engine->evaluate(std::span<const Batch>(all))) loss += entry.weight * entry.sum.item();
  loss = sum_of_losses(loss);
  validation_ = loss;
  const bool first = !std::exchange(bigram_asked_, true);
  const auto count_pairs = [&] { bigram_ = data::bigram_cross_entropy(*data_, samples); };
  if (first && session_->mesh) session_->mesh->on_first_rank(count_pairs);
  else if (first) count_pairs();
  nlohmann::ordered_json j;
  j["step"] = step_, j["event"] = "validation", j["validation_loss"] = number(loss);
  if (bigram_) j["bigram_loss"] = *bigram_;
  metric(j.dump());
  if (first || step_ == steps_ || !display_.live())
    display_.note(fmt::format("step {}: validation loss {:.4f} nats a token{}", step_, loss,
                              bigram_ ? fmt::format(", {:.2f} of a bigram model's {:.4f} on the same tokens", loss / *bigram_, *bigram_) : ""));
}

void Trainer::sample() {
  session_->engine->on_whole_model([this] {
    try {
      write_sample();
    } catch (const std::exception& e) {  // a look at the model must not cost the run, whatever a plugin throws
      const std::string line = std::string("no sample could be written, which does not end the run: ") + e.what();
      display_.warn(line);
      folder_.log(line);
      inference_.reset();
    }
  });
}

void Trainer::write_sample() {
  const Options& train = session_->options().group("train");
  if (!inference_) {
    inference_ = session_->host->make_as<InferenceEngine>(session_->options().plugin("inference"));
  }
  inference_->attach(session_->model, session_->tokenizer, session_->device, session_->engine->options().compute, static_cast<std::uint64_t>(step_));
  Request request;
  request.id = step_;
  session_->tokenizer->encode(train.text("sample_prompt"), request.prompt);
  if (request.prompt.empty()) request.prompt.push_back(std::max(0, session_->tokenizer->end_of_document()));
  request.sampling.temperature = 0.8;
  request.sampling.top_p = 0.95;
  request.sampling.max_tokens = train.integer("sample_tokens");
  request.sampling.seed = static_cast<std::uint64_t>(session_->options().group("run").integer("seed"));
  inference_->submit(std::move(request));
  while (inference_->step({})) {}
  for (const Completion& completion : inference_->finished()) {
    const std::string text = train.text("sample_prompt") + completion.text;
    folder_.sample(step_, text);
    display_.text(fmt::format("step {}: the model writes", step_), text);
  }
}

void Trainer::save() {
  if (saved_step_ == step_) return;
  if (session_->options().group("mesh").integer("check_every") > 0) check_replicas();  // a checkpoint of one replica stands for all
  saver_->wait();
  poll_saver();  // of the save before: what is heard from here on is this one's
  checkpoint::RunState state;
  state.step = step_, state.tokens = tokens_, state.seed = session_->engine->options().seed;
  state.data_cursor = cursor_.to_json();
  const Options kept = session_->kept_options();
  state.recipe = to_yaml(kept), state.recipe_digest = recipe_digest(kept);
  for (const LoadedPlugin& p : session_->host->loaded()) state.plugins.push_back({p.kind, p.name, p.version});
  state.more["spikes"] = fmt::format("{:.17g} {:.17g} {}", spike_mean_, spike_square_, spike_count_);
  checkpoint::Snapshot snapshot;
  HostMemory host;
  snapshot.tensors = saved_tensors(session_->engine->tensors(true, true), host);
  snapshot.state_json = state.to_json();
  snapshot.step = step_;
  saver_->save(snapshot);
  saved_step_ = step_;
  last_save_ = steady_clock::now();
}

void Trainer::poll_saver() {
  if (const auto error = saver_->take_error()) {
    const bool saved = saver_->last_report().step == saved_step_;  // then only the clearing away of older ones failed
    const std::string line = std::string(saved ? "" : "a checkpoint could not be saved, which does not end the run: ") + error->what();
    display_.warn(line);
    folder_.log(line);
    if (!saved) saved_step_ = -1;
  }
}

/// What this rank sent and how long it stood still for it, by communicator and collective; rank 0's is printed.
void Trainer::report_communication() {
  if (!session_->mesh || timed_steps_ == 0) return;
  const auto steps = static_cast<double>(timed_steps_);
  double waited = 0;
  std::vector<std::string> lines;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Communicator* c : session_->mesh->communicators())
    for (const CommRecord& r : c->ledger()) {
      waited += r.waited;
      lines.push_back(fmt::format("  {:<34} {:<15} {:>8.1f} calls {:>10} {:>9.2f} ms {:>9.2f} ms waited", c->name(), r.collective, static_cast<double>(r.calls) / steps,
                                  short_bytes(r.bytes / steps), 1e3 * r.seconds / steps, 1e3 * r.waited / steps));
      rows.push_back({{"communicator", c->name()}, {"collective", r.collective}, {"calls", r.calls}, {"bytes", r.bytes}, {"seconds", r.seconds}, {"waited", r.waited}});
    }
  const std::string title = fmt::format("communication, a step: {:.1f} ms of {:.1f} ms waited for", 1e3 * waited / steps, 1e3 * run_seconds_ / steps);
  folder_.log(title);
  for (const std::string& line : lines) folder_.log(line);
  display_.note(title);
  for (const std::string& line : lines) display_.note(line);
  nlohmann::ordered_json j;
  j["step"] = step_, j["event"] = "communication", j["steps"] = timed_steps_, j["step_seconds"] = run_seconds_, j["collectives"] = std::move(rows);
  metric(j.dump());
}

void Trainer::finish(int signal) {
  report_communication();
  const bool at_end = session_->options().group("checkpoint").flag("at_end");
  if (signal != 0 || at_end) save();
  saver_->wait();
  if (saver_->last_report().step == saved_step_) poll_saver();
  if (const auto error = saver_->take_error()) {
    display_.done();
    fail(error->fault() == Fault::programming ? Fault::programming : Fault::runtime, "train", std::string("the last checkpoint could not be saved: ") + error->what());
  }
  display_.done();
  if (signal != 0) {
    const std::string line = fmt::format("stopped by {} after step {}; the checkpoint is saved, the same command goes on from there",
                                         signal == SIGINT ? "SIGINT" : signal == SIGTERM ? "SIGTERM" : "a signal", step_);
    display_.note(line);
    folder_.log(line);
    return;
  }
  display_.note(fmt::format("done: {} steps, {} tokens in {}; {} holds the checkpoints, metrics.jsonl and samples", step_, short_count(static_cast<double>(tokens_)),
                            short_time(seconds_since(started_)), folder_.path()));
  display_.note("try: capstan generate " + folder_.path() + " --prompt TEXT");
  folder_.log(fmt::format("done at step {}", step_));
}

}  // namespace capstan::train
