// LearningRate: warm-up, then constant, cosine, linear or warm-up-stable-decay.
#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace capstan {
namespace {

double half_cosine(double p) { return 0.5 * (1 + std::cos(std::numbers::pi * p)); }

Decay decay_from(const std::string& name) {
  if (name == "cosine") return Decay::cosine;
  if (name == "linear") return Decay::linear;
  if (name == "wsd") return Decay::wsd;
  return Decay::constant;
}

DecayShape shape_from(const std::string& name) {
  if (name == "cosine") return DecayShape::cosine;
  if (name == "sqrt") return DecayShape::sqrt;
  if (name == "exponential") return DecayShape::exponential;
  return DecayShape::linear;
}

}  // namespace

LearningRate::LearningRate(const Options& options) {
  schedule_.warmup = options.integer("warmup");
  schedule_.decay = decay_from(options.text("decay"));
  schedule_.final = options.number("final");
  schedule_.decay_steps = options.integer("decay_steps");
  schedule_.decay_shape = shape_from(options.text("decay_shape"));
  if (schedule_.decay == Decay::wsd && schedule_.decay_shape == DecayShape::exponential && schedule_.final <= 0) {
    options.refuse("final", "an exponential decay never reaches 0: expected a final share above 0");
  }
}

double LearningRate::factor(std::int64_t step, std::int64_t total_steps) const {
  const std::int64_t warmup = schedule_.warmup;
  if (step < warmup) return static_cast<double>(std::max<std::int64_t>(step, 0)) / static_cast<double>(warmup);

  std::int64_t begin = warmup;  // the last step at the peak
  if (schedule_.decay == Decay::wsd) {
    const std::int64_t fall = schedule_.decay_steps > 0 ? schedule_.decay_steps : std::max<std::int64_t>(1, total_steps / 5);
    begin = std::max(begin, total_steps - fall);
  }
  if (schedule_.decay == Decay::constant || step <= begin) return 1;
  const double p = step >= total_steps ? 1 : static_cast<double>(step - begin) / static_cast<double>(total_steps - begin);

  double left = 1 - p;  // share of the way from final to the peak
  if (schedule_.decay == Decay::cosine) left = half_cosine(p);
  if (schedule_.decay == Decay::wsd) {
    switch (schedule_.decay_shape) {
      case DecayShape::linear: break;
      case DecayShape::cosine: left = half_cosine(p); break;
      case DecayShape::sqrt: left = 1 - std::sqrt(p); break;
      case DecayShape::exponential: return std::pow(schedule_.final, p);
    }
  }
  return schedule_.final + (1 - schedule_.final) * left;
}

}  // namespace capstan
