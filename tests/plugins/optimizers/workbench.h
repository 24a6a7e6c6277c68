// defines: Workbench, Subject: optimizers made by the plugin host as a recipe would, on parameters with addressed numbers.
#pragma once
#include "plugin/host.h"

#include <capstan/optimizer.h>
#include <capstan/random.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan::test {

using Overrides = std::vector<std::pair<std::string, std::string>>;

/// One parameter with its value, gradient and state.
struct Subject {
  std::unique_ptr<Parameter> parameter;
  UpdateItem item;

  std::vector<double> values() const { return numbers(item.value); }
  static std::vector<double> numbers(const Tensor& t) {
    const Tensor wide = t.to(DType::f64);
    std::vector<double> out(static_cast<std::size_t>(t.numel()));
    wide.copy_to_host(out.data(), static_cast<std::int64_t>(out.size() * sizeof(double)));
    return out;
  }
};

class Workbench {
 public:
  explicit Workbench(int threads = 2) : host_(CAPSTAN_PROGRAM), device_(make_cpu_device(threads)) {}

  std::shared_ptr<Optimizer> make(const std::string& plugin, const Overrides& options) {
    return host_.make_as<Optimizer>(host_.choice("optimizer", plugin, options));
  }

  /// Values are normal i of stream `name`, the state that `optimizer` asks for is zero; f64 models keep it in f64.
  Subject subject(const Optimizer& optimizer, const std::string& name, ParameterSpec spec, DType dtype, std::uint64_t seed = 11) {
    Subject s;
    s.parameter = std::make_unique<Parameter>(name, std::move(spec));
    s.item.parameter = s.parameter.get();
    s.item.value = normals(Rng(seed, name), s.parameter->shape(), dtype);
    s.item.grad = Tensor::zeros(s.parameter->shape(), dtype, *device_);
    for (const StateDecl& decl : optimizer.state_of(*s.parameter)) {
      s.item.state.push_back(Tensor::zeros(s.parameter->shape(), dtype == DType::f64 ? DType::f64 : decl.dtype, *device_));
    }
    return s;
  }

  /// The gradient of `step`: normal i of stream `<name>/grad`.
  void draw_gradient(Subject& s, std::int64_t step, std::uint64_t seed = 11) {
    const Rng rng(seed, s.parameter->name() + "/grad", static_cast<std::uint64_t>(step));
    s.item.grad.copy_from(normals(rng, s.parameter->shape(), s.item.value.dtype()));
  }

  void update(Optimizer& optimizer, std::vector<Subject*> subjects, std::int64_t step, double lr_scale = 1, double grad_scale = 1) {
    std::vector<UpdateItem> items;
    for (const Subject* s : subjects) items.push_back(s->item);
    optimizer.update({device_.get(), step, lr_scale, grad_scale}, items);
  }

  Tensor normals(const Rng& rng, const Dims& shape, DType dtype) {
    std::vector<double> v(static_cast<std::size_t>(shape.product()));
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = rng.normal(i);
    return Tensor::of<double>(v, shape, *device_).to(dtype);
  }

  Device& device() { return *device_; }

 private:
  PluginHost host_;
  std::shared_ptr<Device> device_;
};

/// [rows of each part] x columns; one part is a plain matrix. columns 0: a vector.
inline ParameterSpec spec_of(const std::vector<std::int64_t>& parts, std::int64_t columns, Role role = Role::matrix) {
  ParameterSpec spec;
  spec.dims.emplace_back();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    spec.dims[0].push_back(Segment{"out", parts[i], 1, parts.size() > 1 ? "part" + std::to_string(i) : ""});
  }
  if (columns > 0) spec.dims.push_back({Segment{"in", columns, 1, ""}});
  spec.role = columns > 0 ? role : Role::vector;
  return spec;
}

/// The largest |a - b| / max(1, |b|).
inline double difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return 1e300;
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(a[i] - b[i]) / std::max(1.0, std::abs(b[i]));
    worst = d <= worst ? worst : d;  // a NaN stays
    if (d != d) return d;
  }
  return worst;
}

}  // namespace capstan::test
