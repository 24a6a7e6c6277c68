#include "engine/step_queue.h"

#include "engine/engine.h"

#include <capstan/ops.h>
#include <kernels/backend.h>
#include <kernels/queue.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <utility>

namespace capstan {

namespace {

constexpr std::int64_t gate_doubles = static_cast<std::int64_t>(sizeof(kernels::Gate) / sizeof(double));
constexpr std::int64_t part_doubles = static_cast<std::int64_t>(sizeof(kernels::GatePart) / sizeof(double));
constexpr const char* one_gradient = "pp+shard+context+tensor";  // every element stands once among these ranks
constexpr std::int64_t most_losses = kernels::Queue::post_bytes / static_cast<std::int64_t>(sizeof(double)) - gate_doubles;

std::int64_t power_of_two(std::int64_t n) {
  std::int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

bool equal_lengths(const Space& space) {
  const auto& s = space.host_starts;
  for (std::size_t i = 2; i < s.size(); ++i)
    if (s[i] - s[i - 1] != s[1] - s[0]) return false;
  return true;
}

/// Why work on this batch cannot be recorded; "".
std::string refusal(const Batch& batch) {
  if (batch.spaces.size() != 1) return "the batch has " + std::to_string(batch.spaces.size()) + " token spaces, expected one";
  const Space& space = batch.spaces[0];
  if (space.cut) return "the batch has parts of sequences that context ranks share";
  if (space.sequences() < 1 || space.used() != space.capacity)
    return "the batch leaves " + std::to_string(space.capacity - space.used()) + " of its " + std::to_string(space.capacity) + " rows unused, expected none";
  return "";
}

/// `starts` with empty sequences behind the last.
std::vector<std::int32_t> padded(const std::vector<std::int32_t>& starts, std::int64_t sequences) {
  std::vector<std::int32_t> all = starts;
  all.resize(static_cast<std::size_t>(sequences) + 1, starts.back());
  return all;
}

/// Its contents are copied by load().
Batch like(const Batch& batch, std::int64_t sequences, Device& device) {
  const Space& from = batch.spaces[0];
  Batch fixed;
  Space& to = fixed.spaces.emplace_back(from);
  to.recorded = sequences != from.sequences() || !equal_lengths(from);
  to.host_starts = padded(from.host_starts, sequences);
  to.past.assign(static_cast<std::size_t>(sequences), 0);
  to.starts = Tensor::empty(Dims{sequences + 1}, DType::i32, device);
  to.positions = Tensor::empty(from.positions.shape(), from.positions.dtype(), device);
  to.sample_ids = Tensor::empty(from.sample_ids.shape(), from.sample_ids.dtype(), device);
  for (const auto& [name, value] : batch.streams()) fixed.set(name, Tensor::empty(value.shape(), value.dtype(), device));
  fixed.step_weight = 1;  // weights come divided by the step's
  return fixed;
}

void load(Batch& fixed, const Batch& batch) {
  Space& to = fixed.spaces[0];
  const Space& from = batch.spaces[0];
  to.host_starts = padded(from.host_starts, to.sequences());
  to.starts.copy_from_host(to.host_starts.data(), to.starts.bytes());
  to.positions.copy_from(from.positions);
  to.sample_ids.copy_from(from.sample_ids);
  for (const auto& [name, value] : batch.streams()) {
    const bool weight = name == "weight" && batch.step_weight > 0;
    fixed.stream(name).copy_from(weight ? ops::scale(value.detach(), 1 / batch.step_weight) : value.detach());
  }
  fixed.own_weight = batch.own_weight;
}

}  // namespace

StepQueue::StepQueue(Engine& engine, Recording recording)
    : engine_(engine), queue_(*engine.device().backend().queue()), recording_(recording),
      results_(Tensor::zeros(Dims{gate_doubles + most_losses}, DType::f64, engine.device())),
      parts_(Tensor::zeros(Dims{part_doubles * (engine.mesh() ? engine.comm(one_gradient, "reduce").size() : 1)}, DType::f64, engine.device())) {}

StepQueue::~StepQueue() { forget_records(); }

void StepQueue::forget_records() {
  for (auto& [key, walk] : walks_)
    if (walk.record >= 0) queue_.forget_record(std::exchange(walk.record, -1));
  if (update_record_ >= 0) queue_.forget_record(std::exchange(update_record_, -1));
}

std::int64_t StepQueue::recorded() const {
  std::int64_t n = 0;
  for (const auto& [key, walk] : walks_) n += walk.record >= 0;
  return n;
}

Tensor StepQueue::losses(std::int64_t from, std::int64_t count) const { return results_.narrow(0, gate_doubles + from, count); }

std::vector<Leaf*> StepQueue::leaves() const {
  std::vector<Leaf*> all;
  for (const Parameter* p : engine_.model().parameters())
    if (p->trainable()) all.push_back(p->leaf());
  return all;
}

QueuedStep StepQueue::run(std::span<const Batch> batches, std::int64_t step, double lr_scale, double clip) {
  QueuedStep queued;
  refresh_forms();  // weights that came another way, such as from a checkpoint
  const bool together = engine_.executor_ || agreed(batches);
  if (!together && recording_ == Recording::required)
    fail(Fault::input, "run.cuda_graphs", "step " + std::to_string(step) + " cannot be recorded: ranks have batches of different kinds (rows, sequences); set it to auto or off");
  differing_ += !together;
  if (engine_.executor_ || !together) keep(engine_.walk_all(batches, static_cast<std::uint64_t>(step), true), queued);
  else
    for (std::size_t i = 0; i < batches.size(); ++i) microbatch(batches[i], static_cast<std::uint64_t>(step), {i == 0, i + 1 == batches.size()}, queued);
  auto* gate = static_cast<kernels::Gate*>(results_.raw());
  const auto count = static_cast<std::int64_t>(queued.weights.size());
  shut_together(count, clip);
  queued.ticket = queue_.post(gate, (gate_doubles + count) * static_cast<std::int64_t>(sizeof(double)));
  struct Obey {
    kernels::Queue& queue;
    ~Obey() { queue.obey(nullptr); }
  } obey{queue_};
  queue_.obey(gate);
  update(step, lr_scale);
  engine_.discard();
  return queued;
}

/// Makes the gate of what all ranks have, as Engine::gradient_norm() does on the host: the same bits on every rank.
void StepQueue::shut_together(std::int64_t count, double clip) {
  const std::vector<kernels::Piece> gradient = engine_.gradient_pieces();
  auto* gate = static_cast<kernels::Gate*>(results_.raw());
  auto* parts = static_cast<kernels::GatePart*>(parts_.raw());
  const double* sums = losses(0, std::max<std::int64_t>(count, 1)).data<double>();
  if (!engine_.mesh()) {
    queue_.measure(gradient, sums, count, parts);
    return queue_.decide(parts, 1, clip, gate);
  }
  Communicator& c = engine_.comm(one_gradient, "reduce");
  queue_.measure(gradient, sums, count, parts + c.rank());
  c.all_gather(parts + c.rank(), parts, part_doubles, DType::f64).wait();
  queue_.decide(parts, c.size(), clip, gate);
  // Replicas have the same gradient, and losses of their own.
  if (engine_.mesh()->size("replicate") > 1) engine_.comm("replicate", "reduce").all_reduce(&gate->shut, 1, DType::i64, Reduction::max).wait();
}

void StepQueue::refresh_forms() const {
  if (recording_ == Recording::off) return;  // they are made where they are wanted
  for (const Parameter* p : engine_.model().parameters()) p->refresh_derived();
}

void StepQueue::update(std::int64_t step, double lr_scale) {
  const auto work = [&] {
    engine_.apply(step, lr_scale, 1);  // the gate has the factor of clipping
    refresh_forms();
  };
  if (recording_ == Recording::off || engine_.mesh_ || update_plain_ || !std::exchange(update_warm_, true)) return work();
  try {
    if (update_record_ < 0) {
      queue_.begin_record(static_cast<std::uint64_t>(step));
      work();
      update_record_ = queue_.end_record();
    } else {
      queue_.begin_rehearsal(update_record_);
      work();
      queue_.end_rehearsal();
    }
  } catch (const std::exception& e) {
    queue_.cancel_record(), queue_.cancel_rehearsal();
    if (recording_ == Recording::required) fail(Fault::runtime, "run.cuda_graphs", std::string("the optimizer's update cannot be recorded: ") + e.what());
    if (update_record_ >= 0) queue_.forget_record(std::exchange(update_record_, -1));
    why_not_ = std::string("the optimizer's update: ") + e.what();
    update_plain_ = true;
    return work();  // nothing of it has run
  }
  queue_.replay(update_record_, static_cast<std::uint64_t>(step));
}

StepNumbers StepQueue::collect(const QueuedStep& step) {
  std::vector<double> host(static_cast<std::size_t>(gate_doubles) + step.weights.size());
  queue_.collect(step.ticket, host.data(), static_cast<std::int64_t>(host.size() * sizeof(double)));
  static_assert(offsetof(kernels::Gate, norm) == 0 && offsetof(kernels::Gate, shut) == 2 * sizeof(double));
  std::int64_t shut = 0;
  std::memcpy(&shut, &host[2], sizeof shut);
  StepNumbers numbers;
  for (std::size_t i = 0; i < step.weights.size(); ++i) numbers.loss += step.weights[i] * host[static_cast<std::size_t>(gate_doubles) + i];
  numbers.norm = host[0], numbers.updated = shut == 0;
  return numbers;
}

std::int64_t StepQueue::mark() { return queue_.mark(); }
double StepQueue::seconds(std::int64_t begin, std::int64_t end) { return queue_.seconds(begin, end); }

void StepQueue::hold(double seconds) { queue_.hold(seconds); }
void StepQueue::release() { queue_.release(); }

void StepQueue::reopen() { queue_.open_gate(static_cast<kernels::Gate*>(results_.raw())); }

void StepQueue::plain(const Batch& batch, std::uint64_t step, bool last, QueuedStep& queued, std::vector<double>* weights) {
  keep(engine_.walk(batch, step, last), queued, weights);
}

void StepQueue::keep(const std::vector<LossEntry>& entries, QueuedStep& queued, std::vector<double>* weights) {
  if (static_cast<std::int64_t>(queued.weights.size() + entries.size()) > most_losses)
    fail(Fault::input, "data.micro_batch", "a step of more than " + std::to_string(most_losses) + " losses: use larger microbatches");
  for (const LossEntry& entry : entries) {
    losses(static_cast<std::int64_t>(queued.weights.size()), 1).copy_from(entry.sum.view(Dims{1}));
    queued.weights.push_back(entry.weight);
    if (weights != nullptr) weights->push_back(entry.weight);
  }
}

StepQueue::Kind StepQueue::kind_of(const Batch& local, Place place) const {
  Kind kind{{}, refusal(local)};
  if (!kind.refusal.empty()) return kind;
  const Space& space = local.spaces[0];
  const bool equal = equal_lengths(space);
  kind.key = {space.capacity, equal ? space.sequences() : power_of_two(space.sequences()), equal, place.first, place.last && engine_.mesh_ != nullptr};
  return kind;
}

/// Whether all ranks have batches of the same kinds, in the same order: if not, nothing of this step is recorded or replayed.
bool StepQueue::agreed(std::span<const Batch> batches) const {
  if (recording_ == Recording::off || !engine_.mesh_) return true;
  std::uint64_t all = batches.size();
  const auto mix = [&](std::int64_t n) { all = (all ^ static_cast<std::uint64_t>(n)) * 0x9e3779b97f4a7c15u, all ^= all >> 29; };
  for (std::size_t i = 0; i < batches.size(); ++i) {
    const Kind kind = kind_of(engine_.localize(batches[i]), {i == 0, i + 1 == batches.size()});
    const auto& [rows, sequences, equal, first, last] = kind.key;
    for (const std::int64_t n : {rows, sequences, std::int64_t{equal}, std::int64_t{first}, std::int64_t{last}, std::int64_t{kind.refusal.empty()}}) mix(n);
  }
  const auto mine = static_cast<std::int64_t>(all >> 1);
  std::int64_t most[] = {mine, -mine};
  engine_.host("pp+replicate+shard+context+tensor", "control").all_reduce(most, 2, DType::i64, Reduction::max).wait();
  return most[0] == -most[1];
}

bool StepQueue::failed_anywhere(bool here) const {
  if (!engine_.mesh_) return here;
  std::int64_t any = here;
  engine_.host("pp+replicate+shard+context+tensor", "control").all_reduce(&any, 1, DType::i64, Reduction::max).wait();
  return any != 0;
}

void StepQueue::replay(Walk& walk, std::uint64_t step) {
  const auto work = [&] { queue_.replay(walk.record, step); };
  if (!engine_.mesh_) return work();
  engine_.settle();  // of a microbatch ahead of it that was not recorded
  engine_.mesh_->data_world().replay(work);
  engine_.abandon_walk(walk.units);
}

void StepQueue::microbatch(const Batch& whole, std::uint64_t step, Place place, QueuedStep& queued) {
  if (recording_ == Recording::off) return plain(whole, step, place.last, queued);
  const Batch batch = engine_.localize(whole);
  const Kind kind = kind_of(batch, place);
  if (!kind.refusal.empty()) {
    if (recording_ == Recording::required) fail(Fault::input, "run.cuda_graphs", "step " + std::to_string(step) + " cannot be recorded: " + kind.refusal + "; set it to auto or off");
    return plain(whole, step, place.last, queued);
  }
  Walk& walk = walks_[kind.key];
  if (walk.batch.spaces.empty()) walk.batch = like(batch, std::get<1>(kind.key), engine_.device());
  load(walk.batch, batch);
  if (!std::exchange(walk.warm, true)) return plain(walk.batch, step, place.last, queued, &walk.weights);
  if (walk.record < 0 && !record(walk, step, place.last)) return plain(whole, step, place.last, queued);
  replay(walk, step);
  for (Leaf* leaf : walk.filled) leaf->mark_filled();
  const auto at = static_cast<std::int64_t>(queued.weights.size()), count = static_cast<std::int64_t>(walk.weights.size());
  if (at + count > most_losses) fail(Fault::input, "data.micro_batch", "a step of more than " + std::to_string(most_losses) + " losses: use larger microbatches");
  if (count > 0) losses(at, count).copy_from(walk.outs);
  queued.weights.insert(queued.weights.end(), walk.weights.begin(), walk.weights.end());
}

/// False, with nothing changed, when it cannot be recorded and need not be.
bool StepQueue::record(Walk& walk, std::uint64_t step, bool last) {
  engine_.settle();  // what a microbatch before it began is not part of it
  const std::vector<Leaf*> all = leaves();
  std::vector<Leaf*> before;
  for (Leaf* leaf : all)
    if (leaf->has_grad()) before.push_back(leaf);
  const std::vector<GradientState> units = engine_.gradient_states();
  const auto count = static_cast<std::int64_t>(walk.weights.size());
  walk.outs = Tensor::empty(Dims{std::max<std::int64_t>(count, 1)}, DType::f64, engine_.device()).narrow(0, 0, count);
  std::string why;
  queue_.begin_record(step);
  try {
    {
      const std::vector<LossEntry> entries = engine_.walk(walk.batch, step, last);
      engine_.settle();
      if (static_cast<std::int64_t>(entries.size()) != count) throw std::runtime_error("the model has another number of losses than the time before");
      for (std::int64_t i = 0; i < count; ++i) walk.outs.narrow(0, i, 1).copy_from(entries[static_cast<std::size_t>(i)].sum.view(Dims{1}));
    }
    walk.record = queue_.end_record();
  } catch (const std::exception& e) {
    why = e.what();
    engine_.abandon_walk(units);
    for (const Parameter* p : engine_.model().parameters()) p->forget_derived();  // one made inside was not filled
    queue_.cancel_record();
  }
  if (!failed_anywhere(!why.empty())) {
    for (Leaf* leaf : all)
      if (leaf->has_grad()) walk.filled.push_back(leaf);
    walk.units = engine_.gradient_states();
    return true;
  }
  forget_records();  // plain steps want the memory
  engine_.abandon_walk(units);
  for (Leaf* leaf : all) leaf->clear();
  for (Leaf* leaf : before) leaf->mark_filled();
  why_not_ = why.empty() ? "another rank cannot record the training step" : why;
  if (recording_ == Recording::required) fail(Fault::runtime, "run.cuda_graphs", "the training step cannot be recorded: " + why_not_);
  recording_ = Recording::off;
  return false;
}

// --- Engine ----------------------------------------------------------------------------------------------

std::string Engine::cannot_queue() const {
  if (device_->kind() != DeviceKind::cuda || device_->backend().queue() == nullptr) return "steps are not on a GPU (run.device)";
  if (!optimizer_ || !optimizer_->gated()) return "the optimizer does not say that a gate can hold its update back (Optimizer::gated)";
  return "";
}

std::string Engine::cannot_record() const {
  if (const std::string why = cannot_queue(); !why.empty() || !mesh_) return why;
  if (executor_) return "pipeline stages send to each other, which cannot be part of a record (mesh.pp)";
  if (mesh_->size("context") > 1) return "context ranks have parts of sequences (mesh.context)";
  return mesh_->data_world().cannot_record();
}

QueuedStep Engine::queue_step(std::span<const Batch> batches, std::int64_t step, double lr_scale, double clip) {
  if (const std::string why = cannot_queue(); !why.empty()) fail(Fault::programming, "engine", "a step cannot be queued: " + why);
  if (!queue_) queue_ = std::make_unique<StepQueue>(*this, mesh_ && !cannot_record().empty() ? Recording::off : options_.recording);
  finished_ = false;
  walking_back_ = true;
  struct Walking { bool& flag; ~Walking() { flag = false; } } walking{walking_back_};
  return queue_->run(batches, step, lr_scale, clip);
}

StepNumbers Engine::collect(const QueuedStep& step) { return queue_->collect(step); }

void Engine::reopen() {
  if (queue_) queue_->reopen();
}

/// What gradient_norm() sums, in its order.
std::vector<kernels::Piece> Engine::gradient_pieces() {
  finish_gradients();
  std::vector<kernels::Piece> pieces;
  for (const auto& unit : units_) {
    if (!unit->first_stage) continue;
    const Tensor g = unit->piece_grad();
    for (const auto& [begin, end] : unit->counted())
      if (end > begin) pieces.push_back({static_cast<kernels::Num>(g.dtype()), g.narrow(0, begin, end - begin).raw(), end - begin});
  }
  return pieces;
}

}  // namespace capstan
