// The optimizer plugin "@name@": a start to write your own from. It steps by the sign of a running mean of the gradients
// (Bernstein et al. 2018): m = beta m + (1 - beta) g, p = p - lr sign(m).
#include <capstan/optimizer.h>
#include <capstan/plugin.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace capstan;

class @Name@ : public Optimizer {
 public:
  explicit @Name@(const Options& options) : lr_(options.number("lr")), beta_(options.number("beta")) {}

  std::vector<StateDecl> state_of(const Parameter&) const override { return {{"m", DType::f32}}; }
  /// Each element is updated on its own, so a parameter may be cut anywhere.
  Atomicity atomicity(const Parameter&) const override { return Atomicity::element; }
  double peak_lr() const override { return lr_; }

  void update(const UpdateContext& context, std::span<UpdateItem> items) override {
    for (UpdateItem& item : items) {
      if (item.value.dtype() == DType::f64) step<double>(context, item);
      else step<float>(context, item);
    }
  }

 private:
  template <class T>
  void step(const UpdateContext& context, UpdateItem& item) const {
    T* value = item.value.data<T>();
    const T* grad = item.grad.data<T>();
    float* m = item.state[0].data<float>();
    const T lr = static_cast<T>(lr_ * context.lr_scale);
    for (std::int64_t i = 0; i < item.value.numel(); ++i) {
      m[i] = static_cast<float>(beta_ * m[i] + (1 - beta_) * context.grad_scale * grad[i]);
      value[i] -= m[i] > 0 ? lr : m[i] < 0 ? -lr : T(0);
    }
  }

  double lr_, beta_;
};

}  // namespace

CAPSTAN_PLUGIN("optimizer", "@name@", "0.1.0") {
  Schema schema;
  schema.number("lr", 1e-3, "peak learning rate: how far every element moves in a step").above(0);
  schema.number("beta", 0.9, "share of the running mean that each step keeps").range(0, 0.9999);
  registrar.add("optimizer", "@name@", schema, [](const Options& options, Registrar&) {
    return as_interface<Optimizer>(std::make_shared<@Name@>(options));
  });
}
