// The training loop. Setting up and resuming is in trainer_setup.cpp, what happens between steps in
// trainer_report.cpp.
#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace capstan::train {

using std::chrono::steady_clock;

bool StepResult::finite() const { return std::isfinite(loss) && std::isfinite(grad_norm); }

int Trainer::run() {
  Engine& engine = *session_->engine;
  int signal = 0;
  while ((step_ < steps_ && signal == 0) || !flights_.empty()) {
    const auto begin = steady_clock::now();
    const std::int64_t step = step_ + 1;
    const double factor = schedule_.factor(step, steps_);
    // 1. fetch, forward, backward; 2. reduce: the norm sees every element, so one number tells whether the gradient is finite
    StepResult result = queued_ ? queued_step(step, signal) : forward_backward(step);
    result.lr = optimizer_->peak_lr() * factor;
    // 3. update, unless the step is bad
    if (accept(result, step)) {
      if (!result.updated) engine.update(step, factor, result.grad_norm, clip_);
      step_ = step;
      tokens_ += result.tokens;
      // 4. report
      if (!result.updated) result.seconds = std::chrono::duration<double>(steady_clock::now() - begin).count();
      report(result);
    }
    // 5. validate, sample, save; after a rollback the checkpoint's own step has had its turn
    if (!queued_) signal = agree(interrupted_());
    if (step_ == step) after_step(result);
  }
  finish(signal);
  return signal;
}

Trainer::Fetched Trainer::fetch() {
  if (fetched_.empty()) {
    Fetched next{data_->next(), {}};
    next.after = data_->cursor();
    return next;
  }
  Fetched next = std::move(fetched_.front());
  fetched_.pop_front();
  return next;
}

std::int64_t Trainer::tokens_of_step() const {
  const Options& data = session_->options().group("data");
  return data.integer("batch_size") * data.integer("sequence_length");
}

StepResult Trainer::forward_backward(std::int64_t step) {
  session_->world->at(step, "training");
  StepResult result;
  const Fetched data = fetch();
  cursor_ = data.after;
  for (const LossEntry& entry : session_->engine->forward_backward(std::span<const Batch>(data.batches), static_cast<std::uint64_t>(step)))
    result.loss += entry.weight * entry.sum.item();
  result.loss = sum_of_losses(result.loss);
  result.tokens = tokens_of_step();
  result.grad_norm = session_->engine->gradient_norm();
  return result;
}

void Trainer::queue_step(std::int64_t step) {
  session_->world->at(step, "training");
  Flight flight{step, fetch(), {}, steady_clock::now()};
  flight.queued = session_->engine->queue_step(std::span<const Batch>(flight.data.batches), step, schedule_.factor(step, steps_), clip_);
  flights_.push_back(std::move(flight));
}

/// The next step is asked for before this one's result is read, so that the device never waits for the host. A bad step shut the
/// way to the weights for those behind it: it is done again in the plain way, which tells what was bad, and they follow anew.
StepResult Trainer::queued_step(std::int64_t step, int& signal) {
  Engine& engine = *session_->engine;
  if (flights_.empty()) queue_step(step), last_result_ = flights_.back().begin;
  signal = std::max(signal, agree(interrupted_()));
  if (signal == 0 && flights_.size() == 1 && step < steps_ && !due_after(step)) queue_step(step + 1);
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  const StepNumbers numbers = engine.collect(flight.queued);
  if (!numbers.updated) {
    for (; !flights_.empty(); flights_.pop_back()) {
      engine.collect(flights_.back().queued);
      fetched_.push_front(std::move(flights_.back().data));
    }
    fetched_.push_front(flight.data);
    engine.reopen();
    engine.discard();
    return forward_backward(step);
  }
  StepResult result;
  result.loss = sum_of_losses(numbers.loss), result.grad_norm = numbers.norm, result.updated = true;
  result.tokens = tokens_of_step();
  const auto now = steady_clock::now();
  result.seconds = std::chrono::duration<double>(now - std::exchange(last_result_, now)).count();
  cursor_ = flight.data.after;
  return result;
}

double Trainer::sum_of_losses(double mine) const {
  if (session_->mesh) session_->mesh->host("pp+replicate+shard+context+tensor", "control").all_reduce(&mine, 1, DType::f64).wait();
  return mine;
}

int Trainer::agree(int signal) {
  const double minutes = session_->options().group("checkpoint").number("every_minutes");
  std::int64_t asked[2] = {signal, 0};
  if (session_->rank() == 0 && minutes > 0) asked[1] = std::chrono::duration<double>(steady_clock::now() - last_save_).count() >= 60 * minutes;
  if (session_->mesh) session_->mesh->host("pp+replicate+shard+context+tensor", "control").all_reduce(asked, 2, DType::i64, Reduction::max).wait();
  save_due_ = asked[1] != 0;
  return static_cast<int>(asked[0]);
}

bool Trainer::accept(const StepResult& result, std::int64_t step) {
  if (result.updated || result.finite()) {
    if (step > refused_step_) refused_in_a_row_ = 0;  // the way back to the refused step proves nothing
    return true;
  }
  const std::string tensor = session_->engine->first_nonfinite_gradient();
  const std::string what = "step " + std::to_string(step) + ": " + (std::isfinite(result.loss) ? "the loss is finite" : "the loss is not finite") +
                           (!tensor.empty() ? ", the gradient of " + tensor + " is not" : std::isfinite(result.grad_norm) ? "" : ", the gradient's norm is not");
  session_->engine->discard();
  refused_step_ = std::max(refused_step_, step);
  const std::string& policy = session_->options().group("train").text("on_nonfinite");
  folder_.log("not finite, " + policy + ": " + what);
  if (policy == "stop" || ++refused_in_a_row_ >= 10) {
    saver_->wait();
    poll_saver();
    fail(Fault::runtime, "train", what + "; nothing was updated" + (saved_step_ >= 0 ? ", the checkpoint of step " + std::to_string(saved_step_) + " is good" : "") +
                                      (policy == "stop" ? ". Lower optimizer.lr or raise schedule.warmup, or go on past such steps with train.on_nonfinite=skip or rollback"
                                                        : "; it was the tenth bad step in a row, too many for train.on_nonfinite=" + policy +
                                                              ". Lower optimizer.lr, raise schedule.warmup, or look for what is wrong with the data"));
  }
  if (policy == "rollback") {
    roll_back(what);
    return false;
  }
  display_.warn(what + "; the step is skipped");
  step_ = step;  // its data is used up, and the schedule goes on
  metric(metric_line(result));
  return false;
}

}  // namespace capstan::train
