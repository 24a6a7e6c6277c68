// defines: Schedule (what a recipe's group `schedule` says), LearningRate (the factor on the peak rate at a step).
#pragma once
#include <capstan/export.h>
#include <capstan/options.h>

#include <cstdint>

namespace capstan {

/// How the learning rate falls after warm-up.
enum class Decay : std::uint8_t {
  constant,  ///< stays at the peak
  cosine,    ///< half a cosine to the end of the run (Loshchilov & Hutter 2017)
  linear,    ///< a line to the end of the run
  wsd,       ///< stays at the peak, then falls over the run's last steps (Hu et al. 2024)
};

/// The form of wsd's closing fall, p being the share of it that has passed.
enum class DecayShape : std::uint8_t {
  linear,       ///< 1 - p
  cosine,       ///< (1 + cos(pi p)) / 2
  sqrt,         ///< 1 - sqrt(p) (Haegele et al. 2024)
  exponential,  ///< final^p
};

struct Schedule {
  std::int64_t warmup = 0;                 ///< steps from 0 to the peak, on a line
  Decay decay = Decay::constant;
  double final = 0.1;                      ///< share of the peak at the run's last step
  std::int64_t decay_steps = 0;            ///< wsd: length of the fall; 0: a fifth of the run
  DecayShape decay_shape = DecayShape::linear;
};

/// A pure function of the step and the run's length: a resumed or prolonged run needs no memory of it.
class CAPSTAN_API LearningRate {
 public:
  /// From the recipe's group `schedule` (see run_schema()). Error(input) for options that do not go together.
  explicit LearningRate(const Options& options);
  explicit LearningRate(const Schedule& schedule) : schedule_(schedule) {}

  /// The factor on the peak learning rate at `step` (from 1) of `total_steps`. Step `warmup` is at the peak
  /// and step `total_steps` at `final`; later steps stay there.
  double factor(std::int64_t step, std::int64_t total_steps) const;
  const Schedule& schedule() const { return schedule_; }

 private:
  Schedule schedule_;
};

}  // namespace capstan
