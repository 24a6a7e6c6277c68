// SGD with momentum (Polyak 1964) or Nesterov's form of it (Sutskever et al. 2013).
#include <capstan/optimizer.h>
#include <capstan/plugin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace {

using capstan::DType;
using capstan::Fault;

/// The scalars of one step:
///   g' = g + decay p,  b' = momentum b + g',  d = nesterov ? g' + momentum b' : b',  p' = p - lr d
template <class T>
struct Step {
  T grad_scale, decay, momentum, lr;
  bool nesterov;
};

/// Elements [begin, end); `buffer` null: no momentum. T is the type of values and arithmetic, S that of the buffer.
template <class T, class S>
void update_range(const Step<T>& step, T* __restrict value, const T* __restrict grad, S* __restrict buffer,
                  std::int64_t begin, std::int64_t end) {
  const Step<T> s = step;
  if (buffer == nullptr) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) value[i] -= s.lr * (grad[i] * s.grad_scale + s.decay * value[i]);
    return;
  }
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const T g = grad[i] * s.grad_scale + s.decay * value[i];
    const T b = s.momentum * static_cast<T>(buffer[i]) + g;
    buffer[i] = static_cast<S>(b);
    value[i] -= s.lr * (s.nesterov ? g + s.momentum * b : b);
  }
}

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

  void update(const capstan::UpdateContext& context, std::span<capstan::UpdateItem> items) override {
    for (capstan::UpdateItem& item : items) {
      check(item);
      const DType value = item.value.dtype(), state = item.state.empty() ? value : item.state[0].dtype();
      if (value == DType::f32 && state == DType::f32) {
        update_item<float, float>(context, item);
      } else if (value == DType::f64 && state == DType::f64) {
        update_item<double, double>(context, item);
      } else if (value == DType::f64 && state == DType::f32) {
        update_item<double, float>(context, item);
      } else {
        capstan::fail(Fault::programming, "sgd, " + item.parameter->name(),
                      "expected f32 values with f32 state, or f64 values with f32 or f64 state: got " +
                          std::string(name_of(value)) + " and " + std::string(name_of(state)));
      }
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
    if (item.grad.dtype() != item.value.dtype()) {
      capstan::fail(Fault::programming, where, "the gradient must have the value's dtype");
    }
  }

  template <class T, class S>
  void update_item(const capstan::UpdateContext& context, const capstan::UpdateItem& item) const {
    const Step<T> step{.grad_scale = static_cast<T>(context.grad_scale),
                       .decay = static_cast<T>(decays(*item.parameter) ? weight_decay_ : 0),
                       .momentum = static_cast<T>(momentum_),
                       .lr = static_cast<T>(lr_ * context.lr_scale),
                       .nesterov = nesterov_};
    T* const value = item.value.data<T>();
    const T* const grad = item.grad.data<T>();
    S* const buffer = item.state.empty() ? nullptr : item.state[0].data<S>();
    // Every element stands alone, so the cut over threads cannot show in the result.
    constexpr std::int64_t block = 1 << 14;
    const std::int64_t n = item.value.numel(), blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (std::int64_t b = 0; b < blocks; ++b) {
      update_range<T, S>(step, value, grad, buffer, b * block, std::min(n, (b + 1) * block));
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
