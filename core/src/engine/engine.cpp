// The engine over flat units: how they are made, and the walks over them. Where parameters are meanwhile is in gathered.cpp,
// gradients in gradients.cpp, their sums over ranks in sums.cpp, the optimizer's part in update.cpp, what others see in contents.cpp.
#include "engine/internal.h"

#include "base/cuda_device.h"
#include "parallel/context_cut.h"

#include <kernels/backend.h>

#include <algorithm>
#include <utility>

namespace capstan {

namespace {

/// A flat tensor whose memory comes and goes.
Tensor rebindable(std::int64_t size, DType dtype, Device& device) { return Tensor::wrap(nullptr, Dims{size}, dtype, device, nullptr); }

/// Tensors one behind the other in one piece of memory; without it, each in memory of its own.
struct Consecutive {
  std::shared_ptr<void> memory;
  std::int64_t at = 0;
  Tensor zeros(std::int64_t size, DType dtype, Device& device) {
    if (!memory) return Tensor::zeros(Dims{size}, dtype, device);
    const Tensor t = Tensor::wrap(static_cast<std::byte*>(memory.get()) + at, Dims{size}, dtype, device, memory);
    at += t.bytes();
    t.fill(0);
    return t;
  }
};

}  // namespace

Engine::~Engine() {
  queue_.reset();
  reducing_.clear(), summing_.clear();  // handles wait
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

  const DType master = held_type(options_);
  const bool copies = options_.compute != master;
  std::int64_t largest = 0, all = 0, most_of_a_call = 0;
  for (const auto& unit : units_) largest = std::max(largest, unit->size), all += unit->size;
  // What is gathered or summed where it lies.
  Consecutive weights, gradients;
  if (sharding.optimizer && !sharding.parameter) weights.memory = memory_for(all * size_of(options_.compute), "gather", true, false);
  if (options_.gradients)
    gradients.memory = memory_for((sharding.gradient ? all / pieces_ : all) * size_of(master), "reduce", in_pieces() && !sharding.gradient && !narrow_messages(), replicas());
  for (const auto& unit : units_) {
    {
      const HoldingAs holding(*device_, Holding::weights);
      if (sharding.parameter) {
        unit->whole = rebindable(unit->size, options_.compute, *device_);
        unit->master = Tensor::zeros(Dims{unit->region}, master, *device_);
      } else {
        unit->whole = weights.zeros(unit->size, options_.compute, *device_);
        if (copies) unit->master = Tensor::zeros(Dims{unit->region}, master, *device_);
        else unit->master = unit->whole.narrow(0, unit->region_begin, unit->region);
      }
    }
    if (options_.gradients) {
      const HoldingAs holding(*device_, Holding::gradients);
      if (sharding.gradient) {
        unit->whole_grad = rebindable(unit->size, master, *device_);
        unit->grad = gradients.zeros(unit->piece, master, *device_);
      } else {
        unit->whole_grad = gradients.zeros(unit->size, master, *device_);
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

/// On a GPU, memory that the library behind the lane registers once, for collectives over pieces' ranks or replicas; else null.
std::shared_ptr<void> Engine::memory_for(std::int64_t bytes, std::string_view lane, bool pieces, bool replicas) {
  if (device_->kind() != DeviceKind::cuda || bytes == 0 || (!pieces && !replicas)) return nullptr;
  std::shared_ptr<void> memory = mesh_->data_world().shared_memory(static_cast<std::size_t>(bytes));
  if (pieces) comm("shard+context", lane).adopt(memory, static_cast<std::size_t>(bytes));
  if (replicas) comm("replicate", lane).adopt(memory, static_cast<std::size_t>(bytes));
  return memory;
}

void Engine::make_pool(std::optional<Pool>& pool, std::int64_t bytes, std::string_view lane) {
  pool.emplace(*device_, bytes, memory_for(bytes, lane, true, false));
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
      if (std::find(call_units_[c].begin(), call_units_[c].end(), unit_of[index(p)]) == call_units_[c].end()) call_units_[c].push_back(unit_of[index(p)]);
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
  if (in_pieces() || replicas()) {
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

std::vector<LossEntry> Engine::forward_backward(const Batch& batch, std::uint64_t step) { return forward_backward_of(std::span<const Batch>(&batch, 1), step, false); }
std::vector<LossEntry> Engine::forward_backward(std::span<const Batch> batches, std::uint64_t step) { return forward_backward_of(batches, step, true); }

std::vector<LossEntry> Engine::forward_backward_of(std::span<const Batch> batches, std::uint64_t step, bool whole_step) {
  for (const Gradient& g : gradient_)
    if (mesh_ && g.state.summed) fail(Fault::programming, "engine", "gradients of this step have been summed over the ranks: give all of a step's microbatches in one call, and update() or discard() before the next step");
  finished_ = false;
  walking_back_ = true;
  struct Walking { bool& flag; ~Walking() { flag = false; } } walking{walking_back_};
  return walk_all(batches, step, whole_step);
}

/// Counts what is left of a step, so that a unit's gradient is known to be whole when its last backward has run.
void Engine::expect_walks(std::int64_t microbatches) {
  for (Gradient& g : gradient_) g.uses_left = 0;
  for (const std::vector<std::size_t>& units : call_units_)
    for (const std::size_t u : units) gradient_[u].uses_left += microbatches;
}

std::vector<LossEntry> Engine::walk_all(std::span<const Batch> batches, std::uint64_t step, bool whole_step) {
  if (executor_) {
    expect_walks(whole_step ? static_cast<std::int64_t>(batches.size()) : 0);
    return on_stages(batches, [&](std::span<ForwardContext* const> contexts) {
      for (ForwardContext* c : contexts) c->grad = c->training = true, c->step = step;
      return executor_->run(contexts, hooks());
    });
  }
  std::vector<LossEntry> all;
  for (const Batch& batch : batches)
    for (LossEntry& entry : walk(batch, step, whole_step && &batch == &batches.back())) all.push_back(std::move(entry));
  return all;
}

std::vector<LossEntry> Engine::walk(const Batch& batch, std::uint64_t step, bool last) {
  expect_walks(last ? 1 : 0);
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

}  // namespace capstan
