// The training loop. Setting up and resuming is in trainer_setup.cpp, what happens between steps in
// trainer_report.cpp.
#include "train/trainer.h"

#include <algorithm>
#include <cmath>

namespace capstan::train {

using std::chrono::steady_clock;

bool StepResult::finite() const { return std::isfinite(loss) && std::isfinite(grad_norm); }

int Trainer::run() {
  print_header();
  Engine& engine = *session_->engine;
  int signal = 0;
  while (step_ < steps_ && signal == 0) {
    const auto begin = steady_clock::now();
    const std::int64_t step = step_ + 1;
    // 1. fetch, forward, backward
    StepResult result = forward_backward(step);
    // 2. reduce: the norm sees every element, so one number tells whether the gradient is finite
    result.grad_norm = engine.gradient_norm();
    // 3. update, unless the step is bad
    const double factor = schedule_.factor(step, steps_);
    result.lr = optimizer_->peak_lr() * factor;
    if (accept(result, step)) {
      engine.update(step, factor, result.grad_norm, clip_);
      step_ = step;
      tokens_ += result.tokens;
      // 4. report
      result.seconds = std::chrono::duration<double>(steady_clock::now() - begin).count();
      report(result);
    }
    // 5. validate, sample, save; after a rollback the checkpoint's own step has had its turn
    signal = agree(interrupted_());
    if (step_ == step) after_step(result);
  }
  finish(signal);
  return signal;
}

StepResult Trainer::forward_backward(std::int64_t step) {
  session_->world->at(step, "training");
  StepResult result;
  const std::vector<Batch> batches = data_->next();
  for (const LossEntry& entry : session_->engine->forward_backward(std::span<const Batch>(batches), static_cast<std::uint64_t>(step)))
    result.loss += entry.weight * entry.sum.item();
  result.loss = sum_of_losses(result.loss);
  const Options& data = session_->options().group("data");
  result.tokens = data.integer("batch_size") * data.integer("sequence_length");
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
  if (result.finite()) {
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
                                      (refused_in_a_row_ >= 10 ? "; it was the tenth bad step in a row" : "") +
                                      ". Lower optimizer.lr or raise schedule.warmup, or go on past such steps with train.on_nonfinite=skip or rollback");
  }
  if (policy == "rollback") {
    roll_back(what);
    return false;
  }
  display_.warn(what + "; the step is skipped");
  step_ = step;  // its data is used up, and the schedule goes on
  folder_.metric(metric_line(result));
  return false;
}

}  // namespace capstan::train
