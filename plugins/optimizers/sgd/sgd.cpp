// SGD with momentum (Polyak 1964) or Nesterov's form of it (Sutskever et al. 2013).
#include <capstan/optimizer.h>
#include <capstan/plugin.h>
#include <capstan/update.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace {

using capstan::DType;
using capstan::Fault;

class Sgd final : public capstan::Optimizer {
 public:
  explicit Sgd(const capstan::Options& options)
      : lr_(options.number("lr")), momentum_(options.number("momentum")), weight_decay_(options.number("weight_decay")),
        nesterov_(options.flag("nesterov")) {
    if (nesterov_ && momentum_ == 0) options.refuse("nesterov", "needs momentum above 0: it looks ahead along the momentum");
  }

  std::vector<capstan::StateDecl> state_of(const capstan::Parameter&) const override {
    if (momentum_ == 0) return {};
    return {{"momentum", DType::f32}};
  }
  capstan::Atomicity atomicity(const capstan::Parameter&) const override { return capstan::Atomicity::element; }
  double peak_lr() const override { return lr_; }
  bool gated() const override { return true; }

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    for (capstan::UpdateItem& item : items) {
      check(item);
      const capstan::update::Sgd step{.grad_scale = context.grad_scale,
                                      .decay = decays(*item.parameter) ? weight_decay_ : 0,
                                      .momentum = momentum_,
                                      .lr = lr_ * context.lr_scale,
                                      .nesterov = nesterov_};
      capstan::update::sgd(step, item.value, item.grad, item.state.empty() ? capstan::Tensor() : item.state[0]);
    }
  }

 private:
  void check(const capstan::UpdateItem& item) const {
    const std::string where = "sgd, " + item.parameter->name();
    const std::size_t expected = momentum_ == 0 ? 0 : 1;
    if (item.state.size() != expected) {
      capstan::fail(Fault::programming, where, "expected " + std::to_string(expected) + " state tensors: got " +
                                                   std::to_string(item.state.size()));
    }
    std::vector<capstan::Tensor> tensors = item.state;
    tensors.insert(tensors.end(), {item.value, item.grad});
    for (const capstan::Tensor& t : tensors) {
      if (!t.defined() || !t.is_contiguous() || !(t.shape() == item.value.shape())) {
        capstan::fail(Fault::programming, where, "value, gradient and momentum must be contiguous and of one shape");
      }
    }
    const DType value = item.value.dtype(), state = item.state.empty() ? value : item.state[0].dtype();
    if (item.grad.dtype() != value) {
      capstan::fail(Fault::programming, where, "the gradient must have the value's dtype");
    }
    if ((value != DType::f32 && value != DType::f64) || (state != DType::f32 && state != value)) {
      capstan::fail(Fault::programming, where,
                    "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " + std::string(name_of(value)) +
                        " and " + std::string(name_of(state)));
    }
  }

  double lr_, momentum_, weight_decay_;
  bool nesterov_;
};

}  // namespace

CAPSTAN_PLUGIN("optimizer", "sgd", "1.0.0") {
  capstan::Schema schema;
  schema.number("lr", 0.1, "peak learning rate").above(0);
  schema.number("momentum", 0.9, "share of the update's running sum that each step keeps; 0: plain descent").range(0, 0.999999);
  schema.flag("nesterov", false, "look ahead along the momentum");
  schema.number("weight_decay", 0, "added to the gradient, times the weight, on matrices, embeddings and heads").at_least(0);
  registrar.add("optimizer", "sgd", schema, [](const capstan::Options& options, capstan::Registrar&) {
    return capstan::as_interface<capstan::Optimizer>(std::make_shared<Sgd>(options));
  });
}
