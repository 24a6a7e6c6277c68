// The engine over flat units: where parameters and gradients are while a walk goes on. The optimizer's part is in
// update.cpp.
#include "engine/engine.h"

#include "engine/boxes.h"
#include "engine/reductions.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace capstan {

/// A reduce-scatter under way: the unit's whole gradient stays in the pool until it has ended.
struct Engine::Reducing {
  std::size_t unit;
  std::int64_t at;                        // of the whole gradient in the pool
  std::optional<std::int64_t> message;    // of its narrow copy
  Handle handle;
};

namespace {

DType master_type(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

/// A flat tensor whose memory comes and goes.
Tensor rebindable(std::int64_t size, DType dtype, Device& device) { return Tensor::wrap(nullptr, Dims{size}, dtype, device, nullptr); }

bool is_head(const Call& call) { return dynamic_cast<const Head*>(call.block) != nullptr; }

bool contains(const std::vector<std::size_t>& all, std::size_t one) { return std::find(all.begin(), all.end(), one) != all.end(); }

}  // namespace

Engine::~Engine() {
  reducing_.clear();  // handles wait
  if (model_ && model_->runtime() != nullptr) model_->set_runtime(nullptr);
}

Engine::Engine(std::shared_ptr<Model> model, std::shared_ptr<Device> device, EngineOptions options, std::shared_ptr<Mesh> mesh)
    : model_(std::move(model)), device_(std::move(device)), options_(options), mesh_(std::move(mesh)) {
  if (mesh_) {
    pieces_ = mesh_->size("shard") * mesh_->size("context");
    piece_rank_ = mesh_->coordinate("shard") * mesh_->size("context") + mesh_->coordinate("context");
    tensor_ = mesh_->size("tensor");
  }
  if (!in_pieces()) options_.sharding = {};
  const Sharding& sharding = options_.sharding;
  if ((sharding.gradient || sharding.parameter) && !sharding.optimizer)
    fail(Fault::programming, "engine", "parameters or gradients in pieces need an optimizer in pieces");

  // Units: a block's parameters, unless a block before it has them.
  const auto& calls = model_->calls();
  model_->parameters();  // checks that names are unique
  std::vector<const Parameter*> placed;
  std::vector<std::size_t> unit_of;
  std::vector<const Block*> seen;
  for (const Call& call : calls) {
    if (std::find(seen.begin(), seen.end(), call.block) != seen.end()) continue;
    seen.push_back(call.block);
    auto unit = std::make_unique<Unit>();
    for (Parameter* p : call.block->parameters()) {
      if (std::find(placed.begin(), placed.end(), p) != placed.end()) continue;  // tied: its first user owns it
      placed.push_back(p);
      unit_of.push_back(units_.size());
      std::shared_ptr<const TensorPlacement> placement;
      if (tensor_ > 1) placement = std::make_shared<TensorPlacement>(place_tensor(*p, tensor_, mesh_->coordinate("tensor")));
      p->set_placement(placement);
      unit->add(p, std::move(placement));
      parameter_count_ += p->numel();
    }
    if (unit->parameters.empty()) continue;
    unit->cut(pieces_, piece_rank_, sharding.optimizer);
    units_.push_back(std::move(unit));
  }
  call_units_.resize(calls.size());
  for (std::size_t c = 0; c < calls.size(); ++c)
    for (const Parameter* p : calls[c].block->parameters()) {
      const std::size_t u = unit_of[static_cast<std::size_t>(std::find(placed.begin(), placed.end(), p) - placed.begin())];
      if (!contains(call_units_[c], u)) call_units_[c].push_back(u);
    }
  gathered_.resize(units_.size());
  gradient_.resize(units_.size());

  const DType master = master_type(options_.compute);
  const bool copies = options_.compute != master;
  std::int64_t largest = 0, all = 0, most_of_a_call = 0;
  for (const auto& unit : units_) {
    largest = std::max(largest, unit->size), all += unit->size;
    if (sharding.parameter) {
      unit->whole = rebindable(unit->size, options_.compute, *device_);
      unit->master = Tensor::zeros(Dims{unit->region}, master, *device_);
    } else {
      unit->whole = Tensor::zeros(Dims{unit->size}, options_.compute, *device_);
      if (copies) unit->master = Tensor::zeros(Dims{unit->region}, master, *device_);
      else unit->master = unit->whole.narrow(0, unit->region_begin, unit->region);
    }
    if (options_.gradients) {
      if (sharding.gradient) {
        unit->whole_grad = rebindable(unit->size, master, *device_);
        unit->grad = Tensor::zeros(Dims{unit->piece}, master, *device_);
      } else {
        unit->whole_grad = Tensor::zeros(Dims{unit->size}, master, *device_);
        unit->grad = unit->whole_grad;
      }
    }
    for (std::size_t i = 0; i < unit->parameters.size(); ++i) place(*unit, i);
  }
  for (const auto& units : call_units_) {
    std::int64_t sum = 0;
    for (const std::size_t u : units) sum += units_[u]->size;
    most_of_a_call = std::max(most_of_a_call, sum);
  }
  // One for the call that computes, one for the next: twice the largest unit, unless a call uses more by itself.
  const std::int64_t two = std::max(2 * largest, most_of_a_call);
  if (sharding.parameter) gather_pool_.emplace(*device_, (options_.reshard_after_forward ? two : all) * size_of(options_.compute));
  if (options_.gradients && sharding.gradient)
    gradient_pool_.emplace(*device_, two * (size_of(master) + (narrow_messages() ? size_of(options_.reduce) : 0)));

  set_runtime();
}

void Engine::place(Unit& unit, std::size_t i) {
  Parameter& p = *unit.parameters[i].parameter;
  p.set_placement(unit.parameters[i].placement);
  p.place(unit.view(unit.whole, i), options_.gradients);
  if (options_.gradients && p.trainable()) p.leaf()->set_buffer(unit.view(unit.whole_grad, i));
}

void Engine::set_runtime() {
  auto runtime = std::make_shared<Runtime>();
  runtime->mesh = mesh_.get();
  if (options_.sharding.parameter) {
    runtime->hooks.before = [this](const Call& call, WalkStep::Kind step) { before(call, step); };
    runtime->hooks.after = [this](const Call& call, WalkStep::Kind step) { after(call, step); };
  }
  model_->set_runtime(std::move(runtime));
}

EngineMemory Engine::memory() const {
  EngineMemory m;
  for (const auto& u : units_) {
    const bool alias = u->master.storage() == u->whole.storage();
    if (!alias) m.masters += u->master.bytes();
    if (!options_.sharding.parameter) (alias ? m.masters : m.working) += u->whole.bytes();
    if (options_.gradients) m.gradients += u->grad.bytes();
    for (const UnitState& s : u->states) m.optimizer += s.flat.bytes();
  }
  if (gather_pool_) m.gather_pool = gather_pool_->bytes();
  if (gradient_pool_) m.gradient_pool = gradient_pool_->bytes();
  return m;
}

Communicator& Engine::comm(std::string_view axes, std::string_view lane) const { return mesh_->comm(axes, lane); }

std::size_t Engine::index_of(const Call& call) const { return static_cast<std::size_t>(&call - model_->calls().data()); }

// --- parameters ------------------------------------------------------------------------------------------

void Engine::initialize() {
  for (auto& unit : units_)
    for (std::size_t p = 0; p < unit->parts.size(); ++p) {
      const UnitPart& part = unit->parts[p];
      const Tensor values = unit->part(unit->master, p);
      unit->parameters[part.index].parameter->initialize_flat(options_.seed, values.view(Dims{values.numel()}), part.begin);
    }
  publish();
}

void Engine::publish() {
  std::vector<Handle> handles;
  for (std::size_t u = 0; u < units_.size(); ++u) {
    Unit& unit = *units_[u];
    if (options_.sharding.parameter) {
      drop(u);  // what was gathered is old
    } else {
      const Tensor mine = unit.whole.narrow(0, unit.region_begin, unit.region);
      if (unit.master.storage() != unit.whole.storage()) mine.copy_from(unit.master);
      if (options_.sharding.optimizer && !unit.whole.is_meta())
        handles.push_back(comm("shard+context", "gather").all_gather(mine.raw(), unit.whole.raw(), unit.piece, options_.compute));
    }
    for (const UnitParameter& p : unit.parameters) p.parameter->changed();
  }
  for (Handle& h : handles) h.wait();
}

bool Engine::gather(std::size_t u, bool must) {
  Unit& unit = *units_[u];
  Gathered& g = gathered_[u];
  if (g.at) return true;
  g.at = gather_pool_->take(unit.size * size_of(options_.compute));
  if (!g.at) {
    if (must) fail(Fault::programming, "engine", "the pool of gathered parameters is full: " + unit.parameters[0].parameter->name() + "'s unit does not fit");
    return false;
  }
  unit.whole.storage()->data = gather_pool_->at(*g.at);
  if (unit.whole.is_meta()) return true;
  const Tensor mine = unit.whole.narrow(0, unit.piece_begin, unit.piece);
  mine.copy_from(unit.master);  // casts when the working copy is narrower
  g.handle = comm("shard+context", "gather").all_gather(mine.raw(), unit.whole.raw(), unit.piece, options_.compute);
  g.pending = true;
  return true;
}

void Engine::wait_gathered(std::size_t u) {
  if (!std::exchange(gathered_[u].pending, false)) return;
  gathered_[u].handle.wait();
}

void Engine::drop(std::size_t u) {
  if (!gathered_[u].at) return;
  wait_gathered(u);
  units_[u]->whole.storage()->data = nullptr;
  gather_pool_->give(*gathered_[u].at);
  gathered_[u].at.reset();
}

void Engine::before(const Call& call, WalkStep::Kind step) {
  const std::size_t c = index_of(call);
  const auto& needed = call_units_[c];
  const bool backward = step != WalkStep::forward;
  if (options_.sharding.parameter) {
    const auto is_missing = [&](std::size_t u) { return !gathered_[u].at; };
    if (std::any_of(needed.begin(), needed.end(), is_missing) && options_.reshard_after_forward)
      for (std::size_t u = 0; u < units_.size(); ++u)  // a prefetch that was not for this call
        if (!contains(needed, u)) drop(u);
    for (const std::size_t u : needed) gather(u, true);
    for (const std::size_t u : needed) wait_gathered(u);
    const bool last = backward ? c == 0 : c + 1 == call_units_.size();
    if (options_.prefetch && !last)
      for (const std::size_t u : call_units_[backward ? c - 1 : c + 1]) gather(u, false);
  }
  if (!options_.sharding.gradient || !walking_back_) return;
  // A head's gradient grows in its forward, while its logits exist.
  if (step == WalkStep::backward || step == WalkStep::weight || (step == WalkStep::forward && is_head(call)))
    for (const std::size_t u : needed) bind_gradient(u);
}

void Engine::after(const Call& call, WalkStep::Kind step) {
  const std::size_t c = index_of(call);
  if (options_.sharding.parameter) {
    const bool backward = step != WalkStep::forward;
    const bool last = backward ? c == 0 : c + 1 == call_units_.size();
    const bool keep_all = !backward && walking_back_ && !options_.reshard_after_forward;
    for (const std::size_t u : call_units_[c]) {
      const bool next = last ? !backward && walking_back_ : contains(call_units_[backward ? c - 1 : c + 1], u);
      if (!next && !keep_all) drop(u);
    }
  }
  if (options_.sharding.gradient && (step == WalkStep::backward || step == WalkStep::weight))
    for (const std::size_t u : call_units_[c]) start_reduce(u);
}

// --- gradients -------------------------------------------------------------------------------------------

void Engine::bind_gradient(std::size_t u) {
  Unit& unit = *units_[u];
  Gradient& g = gradient_[u];
  if (g.at) return;
  while (!(g.at = gradient_pool_->take(unit.size * size_of(unit.whole_grad.dtype())))) {
    if (reducing_.empty()) fail(Fault::programming, "engine", "the pool of gradients is full: " + unit.parameters[0].parameter->name() + "'s unit does not fit");
    settle_oldest();
  }
  unit.whole_grad.storage()->data = gradient_pool_->at(*g.at);
  for (std::size_t i = 0; i < unit.parameters.size(); ++i) {  // padding adds nothing
    const std::int64_t end = unit.parameters[i].offset + unit.parameters[i].numel();
    const std::int64_t next = i + 1 < unit.parameters.size() ? unit.parameters[i + 1].offset : unit.size;
    if (end < next) unit.whole_grad.narrow(0, end, next - end).fill(0);
  }
}

void Engine::clear_unused(Unit& unit) {
  for (std::size_t i = 0; i < unit.parameters.size(); ++i) {
    const Parameter& p = *unit.parameters[i].parameter;
    if (!p.trainable() || !p.leaf()->has_grad()) unit.view(unit.whole_grad, i).fill(0);
  }
}

void Engine::add_replicas(Unit& unit) {
  if (!unit.replicated() || unit.whole_grad.is_meta()) return;
  // What the same ranks hold goes in one message: runs by their number of ways.
  std::vector<int> ways;
  for (const UnitParameter& p : unit.parameters)
    if (p.placement)
      for (const Run& r : p.placement->runs)
        if (r.ways < p.placement->size && std::find(ways.begin(), ways.end(), r.ways) == ways.end()) ways.push_back(r.ways);
  std::sort(ways.begin(), ways.end());
  for (const int w : ways) {
    std::vector<Tensor> runs;
    std::int64_t count = 0;
    for (std::size_t i = 0; i < unit.parameters.size(); ++i) {
      const UnitParameter& p = unit.parameters[i];
      if (!p.placement || !p.parameter->trainable()) continue;
      const Tensor g = unit.view(unit.whole_grad, i);
      std::int64_t at = 0;
      for (const Run& r : p.placement->runs) {
        if (r.ways == w) {
          runs.push_back(g.narrow(std::max(p.placement->dim, 0), at, r.length));
          count += runs.back().numel();
        }
        at += r.length;
      }
    }
    const Tensor message = Tensor::empty(Dims{count}, unit.whole_grad.dtype(), *device_);
    std::int64_t at = 0;
    for (const Tensor& r : runs) message.narrow(0, at, r.numel()).view(r.shape()).copy_from(r), at += r.numel();
    mesh_->tensor_replicas(w).all_reduce(message.raw(), count, message.dtype()).wait();
    at = 0;
    for (const Tensor& r : runs) r.copy_from(message.narrow(0, at, r.numel()).view(r.shape())), at += r.numel();
  }
}

void Engine::start_reduce(std::size_t u) {
  Unit& unit = *units_[u];
  Gradient& g = gradient_[u];
  if (!g.at) return;
  clear_unused(unit);
  add_replicas(unit);
  auto reducing = std::make_unique<Reducing>();
  reducing->unit = u, reducing->at = *g.at;
  Tensor message = unit.whole_grad;
  if (narrow_messages()) {
    while (!(reducing->message = gradient_pool_->take(unit.size * size_of(options_.reduce)))) {
      if (reducing_.empty()) fail(Fault::programming, "engine", "the pool of gradients is full: no room for a message of " + std::to_string(unit.size) + " elements");
      settle_oldest();
    }
    message = Tensor::wrap(gradient_pool_->at(*reducing->message), Dims{unit.size}, options_.reduce, *device_, nullptr);
    message.copy_from(unit.whole_grad);
  }
  if (!message.is_meta()) {
    const Tensor mine = message.narrow(0, unit.piece_begin, unit.piece);
    reducing->handle = comm("shard+context", "reduce").reduce_scatter(message.raw(), mine.raw(), unit.piece, mine.dtype());
  }
  g.at.reset();
  unit.whole_grad.storage()->data = nullptr;
  for (const UnitParameter& p : unit.parameters)
    if (p.parameter->trainable()) p.parameter->leaf()->clear();
  reducing_.push_back(std::move(reducing));
}

void Engine::settle_oldest() {
  const std::unique_ptr<Reducing> r = std::move(reducing_.front());
  reducing_.erase(reducing_.begin());
  r->handle.wait();
  Unit& unit = *units_[r->unit];
  if (!unit.grad.is_meta()) {
    const DType sent = r->message ? options_.reduce : unit.grad.dtype();
    auto* memory = static_cast<std::byte*>(gradient_pool_->at(r->message.value_or(r->at)));
    Tensor mine = Tensor::wrap(memory + unit.piece_begin * size_of(sent), Dims{unit.piece}, sent, *device_, nullptr);
    if (!gradient_[r->unit].filled) {
      unit.grad.copy_from(mine);
    } else {
      if (r->message) {  // what was sent is summed in the master's type, where the whole gradient was
        const Tensor wide = Tensor::wrap(gradient_pool_->at(r->at), Dims{unit.piece}, unit.grad.dtype(), *device_, nullptr);
        wide.copy_from(mine);
        mine = wide;
      }
      accumulate(unit.grad, mine);
    }
  }
  gradient_[r->unit].filled = true;
  if (r->message) gradient_pool_->give(*r->message);
  gradient_pool_->give(r->at);
}

void Engine::finish_gradients() {
  if (finished_) return;
  finished_ = true;
  std::vector<Handle> handles;
  const auto wait_all = [&] {
    for (Handle& h : handles) h.wait();
    handles.clear();
  };
  if (options_.sharding.gradient) {
    while (!reducing_.empty()) settle_oldest();
    for (std::size_t u = 0; u < units_.size(); ++u)
      if (!std::exchange(gradient_[u].filled, true)) units_[u]->grad.fill(0);
  } else {
    for (auto& unit : units_) {
      clear_unused(*unit);
      add_replicas(*unit);
      if (!in_pieces() || unit->grad.is_meta()) continue;
      Communicator& c = comm("shard+context", "reduce");
      if (narrow_messages()) {
        const Tensor message = unit->grad.to(options_.reduce);
        if (options_.sharding.optimizer) {
          const Tensor mine = message.narrow(0, unit->piece_begin, unit->piece);
          c.reduce_scatter(message.raw(), mine.raw(), unit->piece, message.dtype()).wait();
          unit->piece_grad().copy_from(mine);
        } else {
          c.all_reduce(message.raw(), unit->size, message.dtype()).wait();
          unit->grad.copy_from(message);
        }
        continue;
      }
      if (options_.sharding.optimizer) handles.push_back(c.reduce_scatter(unit->grad.raw(), unit->piece_grad().raw(), unit->piece, unit->grad.dtype()));
      else handles.push_back(c.all_reduce(unit->grad.raw(), unit->size, unit->grad.dtype()));
    }
    wait_all();
  }
  if (mesh_ && mesh_->size("replicate") > 1) {
    for (auto& unit : units_) {
      const Tensor g = unit->region_grad();
      if (!g.is_meta()) handles.push_back(comm("replicate", "reduce").all_reduce(g.raw(), g.numel(), g.dtype()));
    }
    wait_all();
  }
}

void Engine::discard() {
  while (!reducing_.empty()) settle_oldest();
  for (std::size_t u = 0; u < units_.size(); ++u) {
    gradient_[u].filled = false;
    for (const UnitParameter& p : units_[u]->parameters)
      if (p.parameter->trainable()) p.parameter->leaf()->clear();
  }
  finished_ = false;  // what is reduced next is nothing: zeros
}

double Engine::gradient_norm() {
  finish_gradients();
  if (device_->kind() == DeviceKind::meta) return 0;
  double total = 0;
  {
    const auto count = static_cast<double>(parameter_count_);
    OpScope scope(*device_, "gradient norm", {2 * count, 4 * count, 0});
    for (const auto& unit : units_) {
      const Tensor g = unit->piece_grad();
      for (const auto& [begin, end] : unit->counted()) total += squared_norm(g.narrow(0, begin, end - begin));
    }
  }
  if (mesh_) {  // every element stands once among the ranks of one replica
    Communicator& c = comm("pp+shard+context+tensor", "control");
    std::vector<double> sums(static_cast<std::size_t>(c.size()));
    c.all_gather(&total, sums.data(), 1, DType::f64).wait();
    total = 0;
    for (const double s : sums) total += s;
  }
  return std::sqrt(total);
}

std::string Engine::first_nonfinite_gradient() {
  finish_gradients();
  const std::vector<Parameter*> all = model_->parameters();
  auto first = static_cast<std::int64_t>(all.size());
  for (const auto& unit : units_)
    for (const UnitPart& part : unit->parts_in(unit->piece_begin, unit->piece_begin + unit->piece)) {
      const UnitParameter& p = unit->parameters[part.index];
      if (!all_finite(unit->piece_grad().narrow(0, p.offset + part.begin - unit->piece_begin, part.size())))
        first = std::min<std::int64_t>(first, std::find(all.begin(), all.end(), p.parameter) - all.begin());
    }
  if (mesh_) comm("pp+replicate+shard+context+tensor", "control").all_reduce(&first, 1, DType::i64, Reduction::min).wait();
  return first < static_cast<std::int64_t>(all.size()) ? all[static_cast<std::size_t>(first)]->name() : "";
}

// --- walks -----------------------------------------------------------------------------------------------

ForwardContext Engine::context(const Batch& batch) const {
  ForwardContext context(batch, *device_, options_.compute);
  context.seed = options_.seed;
  context.mesh = mesh_.get();
  return context;
}

std::vector<LossEntry> Engine::forward_backward(const Batch& batch, std::uint64_t step) {
  ForwardContext c = context(batch);
  c.grad = c.training = true;
  c.step = step;
  finished_ = false;
  walking_back_ = true;
  WalkHooks hooks;
  if (options_.sharding.parameter || options_.sharding.gradient) {
    hooks.before = [this](const Call& call, WalkStep::Kind step) { before(call, step); };
    hooks.after = [this](const Call& call, WalkStep::Kind step) { after(call, step); };
  }
  capstan::forward_backward(*model_, c, hooks, options_.recompute);
  walking_back_ = false;
  return c.losses();
}

std::vector<LossEntry> Engine::forward_backward(std::span<const Batch> batches, std::uint64_t step) {
  std::vector<LossEntry> all;
  for (const Batch& batch : batches)
    for (LossEntry& entry : forward_backward(batch, step)) all.push_back(std::move(entry));
  return all;
}

std::vector<LossEntry> Engine::evaluate(const Batch& batch) {
  ForwardContext c = context(batch);
  walking_back_ = false;
  run_forward(*model_, c, true);  // tells us of its calls through the model's runtime
  return c.losses();
}

void Engine::on_whole_model(const std::function<void()>& work) {
  const bool scattered = mesh_ && (options_.sharding.parameter || tensor_ > 1 || mesh_->size("context") > 1 || mesh_->size("pp") > 1);
  const bool first = !mesh_ || mesh_->rank() == 0;
  if (!scattered) {
    if (first) work();
    return;
  }
  discard();
  std::vector<Tensor> whole;
  const std::vector<Parameter*> all = model_->parameters();
  for (Parameter* p : all) {
    Tensor value = whole_value(*p);
    if (first) whole.push_back(value.to(options_.compute));
  }
  if (first) {
    model_->set_runtime(nullptr);
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i]->set_placement(nullptr);
      all[i]->place(std::move(whole[i]), false);
    }
    struct Restore {
      Engine& engine;
      ~Restore() {
        for (auto& unit : engine.units_)
          for (std::size_t i = 0; i < unit->parameters.size(); ++i) engine.place(*unit, i);
        engine.set_runtime();
      }
    } restore{*this};
    work();
  }
}

// --- checkpoints -----------------------------------------------------------------------------------------

std::vector<std::string> Engine::names(bool with_optimizer) const {
  std::vector<std::string> all;
  for (const Parameter* p : model_->parameters()) {
    if (p->spec().persistent) all.push_back("model/" + p->name());
    if (with_optimizer && p->trainable())
      for (const StateDecl& decl : optimizer_->state_of(*p)) all.push_back("optimizer/" + decl.name + "/" + p->name());
  }
  return all;
}

std::vector<NamedTensor> Engine::tensors(bool with_optimizer, bool mine) const {
  std::vector<NamedTensor> all;
  if (mine && mesh_ && mesh_->coordinate("replicate") != 0) return all;
  const auto add = [&](const std::string& name, const Unit& unit, std::size_t p, const Tensor& values) {
    const UnitPart& part = unit.parts[p];
    const UnitParameter& owner = unit.parameters[part.index];
    const Dims whole = owner.parameter->shape();
    const std::vector<std::int64_t> shape(whole.begin(), whole.end());
    std::int64_t from = part.begin, until = part.end;
    if (mine) {  // several ranks may hold the region: each writes its piece
      from = std::max(from, unit.piece_begin - owner.offset), until = std::min(until, unit.piece_begin + unit.piece - owner.offset);
      if (from >= until) return;
    }
    if (!owner.placement && from == 0 && until == owner.numel()) {
      all.push_back({name, values, shape, std::vector<std::int64_t>(shape.size(), 0)});
      return;
    }
    const Tensor flat = values.view(Dims{values.numel()});
    for (LocalBox& box : boxes_of(owner.shape, owner.placement.get(), from, until)) {
      if (mine && !box.owned) continue;
      const Dims extent{std::span<const std::int64_t>(box.extent)};
      all.push_back({name, flat.narrow(0, box.at - part.begin, extent.product()).view(extent), shape, std::move(box.begin)});
    }
  };
  for (const auto& unit : units_)
    for (std::size_t p = 0; p < unit->parts.size(); ++p) {
      const Parameter& parameter = *unit->parameters[unit->parts[p].index].parameter;
      if (parameter.spec().persistent) add("model/" + parameter.name(), *unit, p, unit->part(unit->master, p));
    }
  if (with_optimizer)
    for (const auto& unit : units_)
      for (std::size_t p = 0; p < unit->parts.size(); ++p) {
        const Parameter& parameter = *unit->parameters[unit->parts[p].index].parameter;
        if (!parameter.trainable()) continue;
        for (const StateDecl& decl : optimizer_->state_of(parameter))
          add("optimizer/" + decl.name + "/" + parameter.name(), *unit, p, unit->state(decl.name, p));
      }
  return all;
}

}  // namespace capstan
