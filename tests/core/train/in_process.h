// defines: Poison, run_trainer(): a Trainer inside the test, whose model can be made to go wrong on chosen batches.
#pragma once
#include "support.h"
#include "train/trainer.h"

#include <capstan/error.h>
#include <capstan/model.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace capstan::train::testing {

/// A call without parameters that changes h of some training forwards.
class Poison : public Block {
 public:
  using Change = std::function<Tensor(const Tensor& h, ForwardContext& context)>;
  explicit Poison(Change change) : Block("poison"), change_(std::move(change)) {}
  void forward(ForwardContext& context) override;

 private:
  Change change_;
};

/// A model with one more call ahead of its last, the head.
class Poisoned : public Model {
 public:
  Poisoned(std::shared_ptr<Model> model, Poison::Change change);
  const std::vector<Call>& calls() const override { return calls_; }
  Head& head(std::string_view name) override { return model_->head(name); }
  std::int64_t vocabulary() const override { return model_->vocabulary(); }
  std::int64_t hidden() const override { return model_->hidden(); }
  std::int64_t longest() const override { return model_->longest(); }
  std::string describe() const override { return model_->describe(); }

 private:
  std::shared_ptr<Model> model_;
  Poison poison_;
  std::vector<Call> calls_;
};

/// Whether the microbatch holds this sample of the run.
bool holds_sample(const ForwardContext& context, std::int64_t sample);
/// h times a number.
Tensor times(const Tensor& h, double factor);

/// Values of every parameter and optimizer state, as bytes.
using Values = std::vector<std::pair<std::string, std::vector<char>>>;
Values values_of(const Engine& engine);

/// A run to its end, or to its Error.
struct Outcome {
  std::string out, err;
  std::optional<Error> error;
  Values last;                          ///< at the end
  std::vector<Values> after_step;       ///< after each turn of the loop
  std::vector<std::int64_t> steps;      ///< Trainer::step() after each turn
};
/// `prepare` may put other parts into the session.
Outcome run_trainer(const std::string& recipe, const std::vector<std::string>& overrides, const Poison::Change& change = {},
                    const std::function<void(Session&)>& prepare = {});

}  // namespace capstan::train::testing
