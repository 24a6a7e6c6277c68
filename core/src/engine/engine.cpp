// The engine over flat units. On one rank every placement is the whole; a mesh changes where a unit's
// elements live, not this code's callers.
#include "engine/engine.h"

#include <capstan/ops.h>
#include <kernels/cpu/context.h>

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace capstan {

namespace {
constexpr std::int64_t line = 16;  // elements; each parameter starts on a cache line
std::int64_t round_up(std::int64_t n) { return (n + line - 1) / line * line; }
}  // namespace

/// One state of the optimizer over those parameters of a unit that have it.
struct Engine::State {
  std::string name;
  DType dtype;
  std::int64_t size;
  std::vector<std::pair<std::size_t, std::int64_t>> offsets;  // parameter's index in the unit -> offset in `flat`
  Tensor flat;
};

/// One block's parameters: flat masters, gradients and working copies at the same offsets; optimizer states apart.
struct Engine::Unit {
  std::vector<Parameter*> parameters;
  std::vector<std::int64_t> offsets;
  std::int64_t size = 0;
  Tensor master, grad, working;
  std::vector<State> states;

  Tensor view(const Tensor& flat, std::size_t i) const {
    return flat.narrow(0, offsets[i], parameters[i]->numel()).view(parameters[i]->shape());
  }

  /// The state `name` of parameter i.
  Tensor state(const std::string& name, std::size_t i) const {
    for (const State& s : states) {
      if (s.name != name) continue;
      for (const auto& [index, offset] : s.offsets)
        if (index == i) return s.flat.narrow(0, offset, parameters[i]->numel()).view(parameters[i]->shape());
    }
    fail(Fault::programming, parameters[i]->name(), "its optimizer has no state '" + name + "'");
  }
};

Engine::~Engine() = default;

Engine::Engine(std::shared_ptr<Model> model, std::shared_ptr<Device> device, EngineOptions options)
    : model_(std::move(model)), device_(std::move(device)), options_(options) {
  const DType master_type = options_.compute == DType::f64 ? DType::f64 : DType::f32;
  const bool copies = options_.compute != master_type;
  std::vector<Parameter*> placed;
  std::vector<const Block*> seen;
  model_->parameters();  // checks that names are unique
  for (const Call& call : model_->calls()) {
    if (std::find(seen.begin(), seen.end(), call.block) != seen.end()) continue;
    seen.push_back(call.block);
    auto unit = std::make_unique<Unit>();
    for (Parameter* p : call.block->parameters()) {
      if (std::find(placed.begin(), placed.end(), p) != placed.end()) continue;  // tied: its first user owns it
      placed.push_back(p);
      unit->parameters.push_back(p);
      unit->offsets.push_back(unit->size);
      unit->size += round_up(p->numel());
      parameter_count_ += p->numel();
    }
    if (unit->parameters.empty()) continue;
    unit->master = Tensor::zeros(Dims{unit->size}, master_type, *device_);
    if (options_.gradients) unit->grad = Tensor::zeros(Dims{unit->size}, master_type, *device_);
    unit->working = copies ? Tensor::zeros(Dims{unit->size}, options_.compute, *device_) : unit->master;
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
      Parameter& p = *unit->parameters[i];
      p.place(unit->view(unit->working, i), options_.gradients);
      if (options_.gradients && p.trainable()) p.leaf()->set_buffer(unit->view(unit->grad, i));
    }
    units_.push_back(std::move(unit));
  }
}

void Engine::initialize() {
  for (auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) unit->parameters[i]->initialize(options_.seed, unit->view(unit->master, i));
  publish();
}

void Engine::publish() {
  for (auto& unit : units_) {
    if (unit->working.storage() != unit->master.storage()) unit->working.copy_from(unit->master);
    for (Parameter* p : unit->parameters) p->changed();
  }
}

void Engine::attach(std::shared_ptr<Optimizer> optimizer) {
  optimizer_ = std::move(optimizer);
  for (auto& unit : units_) {
    unit->states.clear();
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
      if (!unit->parameters[i]->trainable()) continue;
      for (const StateDecl& decl : optimizer_->state_of(*unit->parameters[i])) {
        const DType dtype = decl.dtype == DType::f32 ? unit->master.dtype() : decl.dtype;
        auto it = std::find_if(unit->states.begin(), unit->states.end(), [&](const State& s) { return s.name == decl.name && s.dtype == dtype; });
        if (it == unit->states.end()) it = unit->states.insert(it, {decl.name, dtype, 0, {}, Tensor()});
        it->offsets.emplace_back(i, it->size);
        it->size += round_up(unit->parameters[i]->numel());
      }
    }
    for (State& state : unit->states) state.flat = Tensor::zeros(Dims{state.size}, state.dtype, *device_);
  }
}

ForwardContext Engine::context(const Batch& batch) const {
  ForwardContext context(batch, *device_, options_.compute);
  context.seed = options_.seed;
  return context;
}

std::vector<LossEntry> Engine::forward_backward(const Batch& batch, std::uint64_t step) {
  ForwardContext c = context(batch);
  c.grad = c.training = true;
  c.step = step;
  capstan::forward_backward(*model_, c, {}, options_.recompute);
  return c.losses();
}

std::vector<LossEntry> Engine::evaluate(const Batch& batch) {
  ForwardContext c = context(batch);
  run_forward(*model_, c, true);
  return c.losses();
}

void Engine::clear_unused_gradients() {
  for (auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
      const Parameter& p = *unit->parameters[i];
      if (p.trainable() && !p.leaf()->has_grad()) unit->view(unit->grad, i).fill(0);
    }
}

double Engine::gradient_norm() {
  if (device_->kind() == DeviceKind::meta) return 0;
  clear_unused_gradients();
  double total = 0;
  OpScope scope(*device_, "gradient norm", {2.0 * static_cast<double>(parameter_count_), 4.0 * static_cast<double>(parameter_count_), 0});
  for (auto& unit : units_) {
    // Fixed blocks, summed in order: the same bits with any number of threads. Padding stays zero.
    constexpr std::int64_t block = 65536;
    const std::int64_t blocks = (unit->size + block - 1) / block;
    std::vector<double> partial(static_cast<std::size_t>(blocks));
    auto sum = [&]<class T>(const T* g) {
#pragma omp parallel for num_threads(device_->cpu().threads()) schedule(static)
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = b * block, end = std::min(unit->size, begin + block);
        double lanes[16] = {};  // fixed lanes, so that the compiler may use vectors without choosing an order
        for (std::int64_t i = begin; i < end; i += 16)
          for (std::int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<double>(g[i + l]) * static_cast<double>(g[i + l]);
        double s = 0;
        for (double x : lanes) s += x;
        partial[static_cast<std::size_t>(b)] = s;
      }
    };
    if (unit->grad.dtype() == DType::f64) sum(unit->grad.data<double>());
    else sum(unit->grad.data<float>());
    for (double x : partial) total += x;
  }
  return std::sqrt(total);
}

std::string Engine::first_nonfinite_gradient() const {
  for (const auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
      const Tensor g = unit->view(unit->grad, i);
      bool finite = true;
      auto look = [&]<class T>(const T* p) {
        for (std::int64_t k = 0; k < g.numel(); ++k) finite &= std::isfinite(p[k]);
      };
      if (g.dtype() == DType::f64) look(g.data<double>());
      else look(g.data<float>());
      if (!finite) return unit->parameters[i]->name();
    }
  return "";
}

void Engine::update(std::int64_t step, double lr_scale, double norm, double clip) {
  clear_unused_gradients();
  UpdateContext u;
  u.device = device_.get();
  u.step = step;
  u.lr_scale = lr_scale;
  u.grad_scale = clip > 0 && norm > clip ? clip / norm : 1.0;
  std::vector<UpdateItem> items;
  for (auto& unit : units_) {
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
      const Parameter& p = *unit->parameters[i];
      if (!p.trainable()) continue;
      UpdateItem item;
      item.parameter = &p;
      item.value = unit->view(unit->master, i);
      item.grad = unit->view(unit->grad, i);
      for (const StateDecl& decl : optimizer_->state_of(p)) item.state.push_back(unit->state(decl.name, i));
      items.push_back(std::move(item));
    }
  }
  {
    OpScope scope(*device_, "optimizer", {12.0 * static_cast<double>(parameter_count_), 16.0 * static_cast<double>(parameter_count_),
                                          12.0 * static_cast<double>(parameter_count_)});
    if (!scope.meta()) {
      // Plugins open plain OpenMP regions: they get the device's threads through this thread's setting.
      const int before = omp_get_max_threads();
      omp_set_num_threads(device_->cpu().threads());
      struct Restore { int n; ~Restore() { omp_set_num_threads(n); } } restore{before};
      optimizer_->update(u, items);
    }
  }
  publish();
  discard();
}

void Engine::discard() {
  for (auto& unit : units_)
    for (Parameter* p : unit->parameters)
      if (p->trainable()) p->leaf()->clear();
}

std::vector<NamedTensor> Engine::tensors(bool with_optimizer) const {
  std::vector<NamedTensor> all;
  for (const auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i)
      if (unit->parameters[i]->spec().persistent) all.push_back({"model/" + unit->parameters[i]->name(), unit->view(unit->master, i)});
  if (with_optimizer)
    for (const auto& unit : units_)
      for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
        if (!unit->parameters[i]->trainable()) continue;
        for (const StateDecl& decl : optimizer_->state_of(*unit->parameters[i]))
          all.push_back({"optimizer/" + decl.name + "/" + unit->parameters[i]->name(), unit->state(decl.name, i)});
      }
  return all;
}

}  // namespace capstan
