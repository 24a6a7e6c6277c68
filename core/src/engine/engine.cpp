// The engine over flat units: where parameters and gradients are while a walk goes on. The optimizer's part is in
// update.cpp.
#include "engine/engine.h"

#include "engine/boxes.h"
#include "engine/reductions.h"
#include "model/call_run.h"
#include "parallel/context_cut.h"

#include <kernels/backend.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace capstan {

/// A reduce-scatter under way: the unit's whole gradient stays in the pool until it has ended.
struct Engine::Reducing {
  std::size_t unit;
  std::int64_t at;                        // of the whole gradient in the pool
  std::optional<std::int64_t> message;    // of its narrow copy
  std::optional<std::int64_t> received;   // of everybody's narrow copies of this rank's piece, where they are added here
  Handle handle;
};

namespace {

DType master_type(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

/// A flat tensor whose memory comes and goes.
Tensor rebindable(std::int64_t size, DType dtype, Device& device) { return Tensor::wrap(nullptr, Dims{size}, dtype, device, nullptr); }

bool contains(const std::vector<std::size_t>& all, std::size_t one) { return std::find(all.begin(), all.end(), one) != all.end(); }

}  // namespace

Engine::~Engine() {
  queue_.reset();
  reducing_.clear();  // handles wait
  if (model_ && model_->runtime() != nullptr) model_->set_runtime(nullptr);
}

Engine::Engine(std::shared_ptr<Model> model, std::shared_ptr<Device> device, EngineOptions options, std::shared_ptr<Mesh> mesh)
    : model_(std::move(model)), device_(std::move(device)), options_(options), mesh_(std::move(mesh)) {
  if (mesh_) {
    pieces_ = mesh_->size("shard") * mesh_->size("context");
    piece_rank_ = mesh_->coordinate("shard") * mesh_->size("context") + mesh_->coordinate("context");
    tensor_ = mesh_->size("tensor");
    pp_ = mesh_->size("pp"), pp_rank_ = mesh_->coordinate("pp");
  }
  if (pp_ > 1 && options_.stage_of_call.size() != model_->calls().size())
    fail(Fault::programming, "engine", "expected a stage for each of the model's " + std::to_string(model_->calls().size()) + " calls, got " + std::to_string(options_.stage_of_call.size()));
  if (!in_pieces()) options_.sharding = {};
  const Sharding sharding = options_.sharding;
  if ((sharding.gradient || sharding.parameter) && !sharding.optimizer)
    fail(Fault::programming, "engine", "parameters or gradients in pieces need an optimizer in pieces");

  make_units();
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
  if (sharding.parameter) make_pool(gather_pool_, (options_.reshard_after_forward ? two : all) * size_of(options_.compute), "gather");
  if (options_.gradients && sharding.gradient)
    make_pool(gradient_pool_, two * (size_of(master) + (narrow_messages() ? (adds_narrow_itself() ? 2 : 1) * size_of(options_.reduce) : 0)), "reduce");

  set_runtime();
  if (pp_ > 1) {
    pipeline::ExecutorOptions e;
    e.recompute = options_.recompute;
    e.hosts = &host("pp", "pipeline");
    executor_ = std::make_unique<pipeline::Executor>(*model_, comm("pp", "pipeline"), options_.pipeline, options_.stage_of_call, e);
  }
}

/// On a GPU in memory that the library behind the lane registers once.
void Engine::make_pool(std::optional<Pool>& pool, std::int64_t bytes, std::string_view lane) {
  if (device_->kind() != DeviceKind::cuda) {
    pool.emplace(*device_, bytes);
    return;
  }
  const std::shared_ptr<void> memory = mesh_->data_world().shared_memory(static_cast<std::size_t>(bytes));
  comm("shard+context", lane).adopt(memory, static_cast<std::size_t>(bytes));
  pool.emplace(*device_, bytes, memory);
}

bool Engine::here(std::size_t call) const { return pp_ == 1 || options_.stage_of_call[call] % pp_ == pp_rank_; }

/// A block's parameters make a unit, unless a block before it has them. One that calls on several pipeline ranks use has a
/// unit of its own: its pieces are then the same on each of them.
void Engine::make_units() {
  const auto& calls = model_->calls();
  const std::vector<Parameter*> all = model_->parameters();  // checks that names are unique
  for (const Parameter* p : all) parameter_count_ += p->numel();
  std::vector<std::vector<int>> holders(all.size());
  const auto index = [&](const Parameter* p) { return static_cast<std::size_t>(std::find(all.begin(), all.end(), p) - all.begin()); };
  for (std::size_t c = 0; c < calls.size(); ++c)
    for (const Parameter* p : calls[c].block->parameters()) {
      std::vector<int>& h = holders[index(p)];
      const int rank = pp_ == 1 ? 0 : options_.stage_of_call[c] % pp_;
      if (std::find(h.begin(), h.end(), rank) == h.end()) h.push_back(rank);
    }
  std::vector<std::size_t> unit_of(all.size(), units_.max_size());
  const auto add = [&](Unit& unit, Parameter* p) {
    unit_of[index(p)] = units_.size();
    std::shared_ptr<const TensorPlacement> placement;
    if (tensor_ > 1) placement = std::make_shared<TensorPlacement>(place_tensor(*p, tensor_, mesh_->coordinate("tensor")));
    unit.add(p, std::move(placement));
  };
  const auto finish = [&](std::unique_ptr<Unit> unit) {
    if (unit->parameters.empty()) return;
    unit->cut(pieces_, piece_rank_, options_.sharding.optimizer);
    units_.push_back(std::move(unit));
  };
  for (std::size_t c = 0; c < calls.size(); ++c) {
    if (!here(c)) continue;
    auto unit = std::make_unique<Unit>();
    for (Parameter* p : calls[c].block->parameters())
      if (unit_of[index(p)] == units_.max_size() && holders[index(p)].size() == 1) add(*unit, p);  // tied in a stage: its first user owns it
    finish(std::move(unit));
    for (Parameter* p : calls[c].block->parameters()) {
      if (unit_of[index(p)] != units_.max_size()) continue;
      auto own = std::make_unique<Unit>();
      add(*own, p);
      own->stages = holders[index(p)];
      std::sort(own->stages.begin(), own->stages.end());
      own->first_stage = own->stages.front() == pp_rank_;
      const std::vector<int> column = mesh_->layout().group(mesh_->rank(), "pp");
      std::vector<int> ranks;
      for (const int stage : own->stages) ranks.push_back(column[static_cast<std::size_t>(stage)]);
      const std::string name = "stages of " + p->name() + " from rank " + std::to_string(column.front());
      own->across_stages = mesh_->data_world().make(name, ranks);
      own->hosts_across_stages = &mesh_->data_world() == &mesh_->world() ? own->across_stages : mesh_->world().make(name + " of hosts", ranks);
      finish(std::move(own));
    }
  }
  call_units_.resize(calls.size());
  for (std::size_t c = 0; c < calls.size(); ++c) {
    if (!here(c)) continue;
    for (const Parameter* p : calls[c].block->parameters())
      if (!contains(call_units_[c], unit_of[index(p)])) call_units_[c].push_back(unit_of[index(p)]);
  }
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
Communicator& Engine::host(std::string_view axes, std::string_view lane) const { return mesh_->host(axes, lane); }

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
  for (const UnitParameter& p : units_[u]->parameters) p.parameter->forget_derived();  // they would outstay what was gathered
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
  const auto room = [&] {
    std::optional<std::int64_t> at;
    while (!(at = gradient_pool_->take(unit.size * size_of(options_.reduce)))) {
      if (reducing_.empty()) fail(Fault::programming, "engine", "the pool of gradients is full: no room for a message of " + std::to_string(unit.size) + " elements");
      settle_oldest();
    }
    return at;
  };
  if (narrow_messages()) {
    reducing->message = room();
    if (adds_narrow_itself()) reducing->received = room();
    message = Tensor::wrap(gradient_pool_->at(*reducing->message), Dims{unit.size}, options_.reduce, *device_, nullptr);
    message.copy_from(unit.whole_grad);
  }
  if (!message.is_meta()) {
    const Tensor mine = message.narrow(0, unit.piece_begin, unit.piece);
    Communicator& c = comm("shard+context", "reduce");
    reducing->handle = reducing->received ? c.all_to_all(message.raw(), gradient_pool_->at(*reducing->received), unit.piece, mine.dtype())
                                          : c.reduce_scatter(message.raw(), mine.raw(), unit.piece, mine.dtype());
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
    if (r->received) {
      mine = Tensor::wrap(gradient_pool_->at(r->at), Dims{unit.piece}, unit.grad.dtype(), *device_, nullptr);
      add_narrow(gradient_pool_->at(*r->received), mine);
    }
    if (!gradient_[r->unit].filled) {
      unit.grad.copy_from(mine);
    } else {
      if (r->message && !r->received) {  // what was sent is summed in the master's type, where the whole gradient was
        const Tensor wide = Tensor::wrap(gradient_pool_->at(r->at), Dims{unit.piece}, unit.grad.dtype(), *device_, nullptr);
        wide.copy_from(mine);
        mine = wide;
      }
      accumulate(unit.grad, mine);
    }
  }
  gradient_[r->unit].filled = true;
  if (r->message) gradient_pool_->give(*r->message);
  if (r->received) gradient_pool_->give(*r->received);
  gradient_pool_->give(r->at);
}

/// Libraries of GPUs round a narrow sum at every hop: there pieces are sent as they are, and added here.
bool Engine::adds_narrow_itself() const { return device_->kind() == DeviceKind::cuda; }

void Engine::add_narrow(const void* received, const Tensor& sum) {
  const auto num = [](DType d) { return static_cast<kernels::Num>(d); };
  device_->backend().sum_middle(num(options_.reduce), 1, pieces_, sum.numel(), received, 1.0, num(sum.dtype()), sum.raw());
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
        if (adds_narrow_itself()) {
          const Tensor received = Tensor::empty(message.shape(), message.dtype(), *device_), mine = unit->piece_grad();
          c.all_to_all(message.raw(), received.raw(), unit->piece, message.dtype()).wait();
          add_narrow(received.raw(), mine);
          if (options_.sharding.optimizer) continue;
          const Tensor sum = mine.to(message.dtype());
          c.all_gather(sum.raw(), message.raw(), unit->piece, message.dtype()).wait();
          unit->grad.copy_from(message);
        } else if (options_.sharding.optimizer) {
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
  for (auto& unit : units_) {  // every stage that uses a tied parameter has a part of its gradient
    const Tensor g = unit->region_grad();
    if (unit->across_stages && !g.is_meta()) handles.push_back(unit->across_stages->all_reduce(g.raw(), g.numel(), g.dtype()));
  }
  wait_all();
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
      if (!unit->first_stage) continue;
      const Tensor g = unit->piece_grad();
      for (const auto& [begin, end] : unit->counted()) total += squared_norm(g.narrow(0, begin, end - begin));
    }
  }
  if (mesh_) {  // every element stands once among the ranks of one replica
    Communicator& c = host("pp+shard+context+tensor", "control");
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
  if (mesh_) host("pp+replicate+shard+context+tensor", "control").all_reduce(&first, 1, DType::i64, Reduction::min).wait();
  return first < static_cast<std::int64_t>(all.size()) ? all[static_cast<std::size_t>(first)]->name() : "";
}

// --- walks -----------------------------------------------------------------------------------------------

ForwardContext Engine::context(const Batch& batch) const {
  ForwardContext context(batch, *device_, options_.compute);
  context.seed = options_.seed;
  context.mesh = mesh_.get();
  context.linear = options_.linear;
  return context;
}

/// This rank's rows of a data rank's batch.
Batch Engine::localize(const Batch& batch) const {
  if (!mesh_ || (mesh_->size("context") == 1 && tensor_ == 1)) return batch;
  return parallel::cut_context(batch, mesh_->size("context"), mesh_->coordinate("context"), tensor_);
}

WalkHooks Engine::hooks() {
  WalkHooks hooks;
  if (options_.sharding.parameter || options_.sharding.gradient) {
    hooks.before = [this](const Call& call, WalkStep::Kind step) { before(call, step); };
    hooks.after = [this](const Call& call, WalkStep::Kind step) { after(call, step); };
  }
  return hooks;
}

/// Contexts of all microbatches for the pipeline.
template <class Walk>
std::vector<LossEntry> Engine::on_stages(std::span<const Batch> batches, Walk&& walk) {
  std::vector<Batch> local;
  for (const Batch& batch : batches) local.push_back(localize(batch));
  std::vector<std::unique_ptr<ForwardContext>> contexts;
  std::vector<ForwardContext*> pointers;
  for (const Batch& batch : local) {
    contexts.push_back(std::make_unique<ForwardContext>(context(batch)));
    pointers.push_back(contexts.back().get());
  }
  return walk(std::span<ForwardContext* const>(pointers));
}

std::vector<LossEntry> Engine::forward_backward(const Batch& batch, std::uint64_t step) { return forward_backward(std::span<const Batch>(&batch, 1), step); }

std::vector<LossEntry> Engine::forward_backward(std::span<const Batch> batches, std::uint64_t step) {
  finished_ = false;
  walking_back_ = true;
  struct Walking { bool& flag; ~Walking() { flag = false; } } walking{walking_back_};
  if (executor_)
    return on_stages(batches, [&](std::span<ForwardContext* const> contexts) {
      for (ForwardContext* c : contexts) c->grad = c->training = true, c->step = step;
      return executor_->run(contexts, hooks());
    });
  std::vector<LossEntry> all;
  for (const Batch& batch : batches)
    for (LossEntry& entry : walk(batch, step)) all.push_back(std::move(entry));
  return all;
}

std::vector<LossEntry> Engine::walk(const Batch& batch, std::uint64_t step) {
  const Batch local = localize(batch);
  ForwardContext c = context(local);
  c.grad = c.training = true;
  c.step = step;
  capstan::forward_backward(*model_, c, hooks(), options_.recompute);
  return c.losses();
}

std::vector<LossEntry> Engine::evaluate(const Batch& batch) { return evaluate(std::span<const Batch>(&batch, 1)); }

std::vector<LossEntry> Engine::evaluate(std::span<const Batch> batches) {
  walking_back_ = false;
  if (executor_) return on_stages(batches, [&](std::span<ForwardContext* const> contexts) { return executor_->evaluate(contexts, hooks()); });
  std::vector<LossEntry> all;
  for (const Batch& batch : batches) {
    const Batch local = localize(batch);
    ForwardContext c = context(local);
    run_forward(*model_, c, true);  // tells us of its calls through the model's runtime
    for (const LossEntry& entry : c.losses()) all.push_back(entry);
  }
  return all;
}

void Engine::on_whole_model(const std::function<void()>& work) {
  if (!mesh_) return work();
  const bool scattered = options_.sharding.parameter || tensor_ > 1 || mesh_->size("context") > 1 || pp_ > 1;
  const bool first = mesh_->rank() == 0;
  if (!scattered) return mesh_->on_first_rank(work);
  discard();
  std::vector<Tensor> whole;
  const std::vector<Parameter*> all = model_->parameters();
  for (Parameter* p : all) {
    Tensor value = whole_value(*p);
    // The first pipeline rank that holds it hands it to rank 0.
    std::int64_t holder = value.defined() ? pp_rank_ : pp_;
    if (pp_ > 1) host("pp", "exchange").all_reduce(&holder, 1, DType::i64, Reduction::min).wait();
    const auto& layout = mesh_->layout();
    const bool sends = pp_rank_ == holder && holder > 0 && layout.group(mesh_->rank(), "pp").front() == 0;
    const DType type = master_type(options_.compute);
    if (sends) comm("pp", "exchange").send(value.raw(), value.numel(), type, 0).wait();
    if (first && holder > 0) {
      value = Tensor::empty(p->shape(), type, *device_);
      comm("pp", "exchange").receive(value.raw(), value.numel(), type, static_cast<int>(holder)).wait();
    }
    if (first) whole.push_back(value.to(options_.compute));
  }
  mesh_->on_first_rank([&] {  // as long as it takes: no timeout runs
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
  });
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
      if (mine && !unit->first_stage) continue;
      const Parameter& parameter = *unit->parameters[unit->parts[p].index].parameter;
      if (parameter.spec().persistent) add("model/" + parameter.name(), *unit, p, unit->part(unit->master, p));
    }
  if (with_optimizer)
    for (const auto& unit : units_)
      for (std::size_t p = 0; p < unit->parts.size(); ++p) {
        const Parameter& parameter = *unit->parameters[unit->parts[p].index].parameter;
        if (!parameter.trainable() || (mine && !unit->first_stage)) continue;
        for (const StateDecl& decl : optimizer_->state_of(parameter))
          add("optimizer/" + decl.name + "/" + parameter.name(), *unit, p, unit->state(decl.name, p));
      }
  return all;
}

}  // namespace capstan
