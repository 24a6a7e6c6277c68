// AdamW: Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019), in one pass over memory.
#include <capstan/optimizer.h>
#include <capstan/plugin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace {

using capstan::DType;
using capstan::Fault;
using capstan::Tensor;

/// The scalars of one step, the same for every element of a parameter. With bias correction
///   m' = m + (1 - beta1)(g - m),  v' = beta2 v + (1 - beta2) g^2
///   p' = (1 - lr decay) p - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + epsilon)
template <class T>
struct Step {
  T grad_scale, keep, rate, beta1_rest, beta2, beta2_rest, v_scale, epsilon;
};

/// Elements [begin, end). T is the type of values and arithmetic, S that of the moments.
template <class T, class S>
void update_range(const Step<T>& step, T* __restrict value, const T* __restrict grad, S* __restrict m, S* __restrict v,
                  std::int64_t begin, std::int64_t end) {
  const Step<T> s = step;  // in registers: the stores below cannot change it
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const T g = grad[i] * s.grad_scale;
    const T m_old = static_cast<T>(m[i]);
    const T m_new = m_old + s.beta1_rest * (g - m_old);
    const T v_new = s.beta2 * static_cast<T>(v[i]) + s.beta2_rest * (g * g);
    m[i] = static_cast<S>(m_new);
    v[i] = static_cast<S>(v_new);
    value[i] = s.keep * value[i] - s.rate * (m_new / (std::sqrt(v_new) * s.v_scale + s.epsilon));
  }
}

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

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    if (context.step < 1) {
      capstan::fail(Fault::programming, "adamw", "steps count from 1: got " + std::to_string(context.step));
    }
    for (capstan::UpdateItem& item : items) {
      check(item);
      const DType value = item.value.dtype(), state = item.state[0].dtype();
      if (value == DType::f32 && state == DType::f32) {
        update_item<float, float>(context, item);
      } else if (value == DType::f64 && state == DType::f64) {
        update_item<double, double>(context, item);
      } else if (value == DType::f64 && state == DType::f32) {
        update_item<double, float>(context, item);
      } else {
        capstan::fail(Fault::programming, "adamw, " + item.parameter->name(),
                      "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " +
                          std::string(name_of(value)) + " and " + std::string(name_of(state)));
      }
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
    if (item.grad.dtype() != item.value.dtype() || item.state[0].dtype() != item.state[1].dtype()) {
      capstan::fail(Fault::programming, where, "the gradient must have the value's dtype, and m that of v");
    }
  }

  template <class T, class S>
  void update_item(const capstan::UpdateContext& context, const capstan::UpdateItem& item) const {
    const double lr = lr_ * context.lr_scale;
    const double decay = decays(*item.parameter) ? weight_decay_ : 0;
    const double t = static_cast<double>(context.step);
    const Step<T> step{.grad_scale = static_cast<T>(context.grad_scale),
                       .keep = static_cast<T>(1 - lr * decay),
                       .rate = static_cast<T>(lr / (1 - std::pow(beta1_, t))),
                       .beta1_rest = static_cast<T>(1 - beta1_),
                       .beta2 = static_cast<T>(beta2_),
                       .beta2_rest = static_cast<T>(1 - beta2_),
                       .v_scale = static_cast<T>(1 / std::sqrt(1 - std::pow(beta2_, t))),
                       .epsilon = static_cast<T>(epsilon_)};
    T* const value = item.value.data<T>();
    const T* const grad = item.grad.data<T>();
    S* const m = item.state[0].data<S>();
    S* const v = item.state[1].data<S>();
    // Every element stands alone, so the cut over threads cannot show in the result.
    constexpr std::int64_t block = 1 << 14;
    const std::int64_t n = item.value.numel(), blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (std::int64_t b = 0; b < blocks; ++b) {
      update_range<T, S>(step, value, grad, m, v, b * block, std::min(n, (b + 1) * block));
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
