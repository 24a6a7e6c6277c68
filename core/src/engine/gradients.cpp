// Gradients: from the leaves of a backward to the piece that this rank keeps, and what is asked of them. Sums of whole gradients
// and over replicas are in sums.cpp.
#include "engine/internal.h"

#include "engine/reductions.h"

#include <kernels/backend.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace capstan {

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

void Engine::start_reduce(std::size_t u, bool last) {
  Unit& unit = *units_[u];
  Gradient& g = gradient_[u];
  if (!g.at) return;
  clear_unused(unit);
  add_replicas(unit);
  auto reducing = std::make_unique<Reducing>();
  reducing->unit = u, reducing->at = *g.at, reducing->last = last;
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
    if (!gradient_[r->unit].state.filled) {
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
  gradient_[r->unit].state.filled = true;
  if (r->message) gradient_pool_->give(*r->message);
  if (r->received) gradient_pool_->give(*r->received);
  gradient_pool_->give(r->at);
  if (r->last && replicas()) start_sum(r->unit);
}

/// Libraries of GPUs round a narrow sum at every hop: there pieces are sent as they are, and added here.
bool Engine::adds_narrow_itself() const { return device_->kind() == DeviceKind::cuda; }

void Engine::add_narrow(const void* received, const Tensor& sum) {
  const auto num = [](DType d) { return static_cast<kernels::Num>(d); };
  device_->backend().sum_middle(num(options_.reduce), 1, pieces_, sum.numel(), received, 1.0, num(sum.dtype()), sum.raw());
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

}  // namespace capstan
