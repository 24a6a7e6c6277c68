// AdamW: Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019), in one pass over memory.
#include <capstan/optimizer.h>
#include <capstan/plugin.h>
#include <capstan/update.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace {

using capstan::DType;
using capstan::Fault;
using capstan::Tensor;

class AdamW final : public capstan::Optimizer {
 public:
  explicit AdamW(const capstan::Options& options)
      : lr_(options.number("lr")), beta1_(options.number("beta1")), beta2_(options.number("beta2")),
        epsilon_(options.number("epsilon")), weight_decay_(options.number("weight_decay")) {}

  std::vector<capstan::StateDecl> state_of(const capstan::Parameter&) const override {
    return {{"m", DType::f32}, {"v", DType::f32}};
  }
  capstan::Atomicity atomicity(const capstan::Parameter&) const override { return capstan::Atomicity::element; }
  double peak_lr() const override { return lr_; }
  bool gated() const override { return true; }

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    if (context.step < 1) {
      capstan::fail(Fault::programming, "adamw", "steps count from 1: got " + std::to_string(context.step));
    }
    for (capstan::UpdateItem& item : items) {
      check(item);
      const double lr = lr_ * context.lr_scale, t = static_cast<double>(context.step);
      const double decay = decays(*item.parameter) ? weight_decay_ : 0;
      // With bias correction: lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + epsilon)
      const capstan::update::AdamW step{.grad_scale = context.grad_scale,
                                        .keep = 1 - lr * decay,
                                        .rate = lr / (1 - std::pow(beta1_, t)),
                                        .beta1_rest = 1 - beta1_,
                                        .beta2 = beta2_,
                                        .beta2_rest = 1 - beta2_,
                                        .v_scale = 1 / std::sqrt(1 - std::pow(beta2_, t)),
                                        .epsilon = epsilon_};
      capstan::update::adamw(step, item.value, item.grad, item.state[0], item.state[1]);
    }
  }

 private:
  static void check(const capstan::UpdateItem& item) {
    const std::string where = "adamw, " + item.parameter->name();
    if (item.state.size() != 2) {
      capstan::fail(Fault::programming, where, "expected state m and v: got " + std::to_string(item.state.size()) + " tensors");
    }
    for (const Tensor* t : {&item.value, &item.grad, &item.state[0], &item.state[1]}) {
      if (!t->defined() || !t->is_contiguous() || !(t->shape() == item.value.shape())) {
        capstan::fail(Fault::programming, where, "value, gradient, m and v must be contiguous and of one shape");
      }
    }
    const DType value = item.value.dtype(), state = item.state[0].dtype();
    if (item.grad.dtype() != value || state != item.state[1].dtype()) {
      capstan::fail(Fault::programming, where, "the gradient must have the value's dtype, and m that of v");
    }
    if ((value != DType::f32 && value != DType::f64) || (state != DType::f32 && state != value)) {
      capstan::fail(Fault::programming, where,
                    "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " + std::string(name_of(value)) +
                        " and " + std::string(name_of(state)));
    }
  }

  double lr_, beta1_, beta2_, epsilon_, weight_decay_;
};

}  // namespace

CAPSTAN_PLUGIN("optimizer", "adamw", "1.0.0") {
  capstan::Schema schema;
  schema.number("lr", 3e-4, "peak learning rate").above(0);
  schema.number("beta1", 0.9, "share of the gradient's running mean that each step keeps").range(0, 0.999999);
  schema.number("beta2", 0.95, "share of the squared gradient's running mean that each step keeps").range(0, 0.9999999);
  schema.number("epsilon", 1e-8, "added to the root of the squared gradient's mean").above(0);
  schema.number("weight_decay", 0.1, "pull towards zero per unit of learning rate, on matrices, embeddings and heads")
      .at_least(0);
  registrar.add("optimizer", "adamw", schema, [](const capstan::Options& options, capstan::Registrar&) {
    return capstan::as_interface<capstan::Optimizer>(std::make_shared<AdamW>(options));
  });
}
