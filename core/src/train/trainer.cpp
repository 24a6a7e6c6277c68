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
    if (step_ == step) after_step(result);
    signal = interrupted_();
  }
  finish(signal);
  return signal;
}

StepResult Trainer::forward_backward(std::int64_t step) {
  StepResult result;
  for (const Batch& batch : data_->next()) {
    for (const LossEntry& entry : session_->engine->forward_backward(batch, static_cast<std::uint64_t>(step)))
      result.loss += entry.weight * entry.sum.item();
    result.tokens += batch.space().capacity;
  }
  return result;
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
