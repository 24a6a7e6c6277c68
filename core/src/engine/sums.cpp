// The sums of a step's gradients over ranks: of whole ones (ddp, zero1) over the pieces' ranks, of every one over replicas and
// over the stages that share a parameter. A unit's begins when the last backward of the step has made its gradient, and runs beside
// the backward of the units before it.
#include "engine/internal.h"

#include <kernels/backend.h>

#include <memory>
#include <utility>
#include <vector>

namespace capstan {

namespace {

constexpr std::size_t most_ahead = 2;  // sums under way before a second half is waited for

}  // namespace

void Engine::start_sum(std::size_t u) {
  Unit& unit = *units_[u];
  auto sum = std::make_unique<Summing>();
  sum->unit = u;
  if (!options_.sharding.gradient) {
    clear_unused(unit);
    add_replicas(unit);
  }
  gradient_[u].state.summed = true;
  if (unit.grad.is_meta()) return;
  if (options_.sharding.gradient || !in_pieces()) {
    sum->pieces_ended = true;
  } else {
    Communicator& c = comm("shard+context", "reduce");
    Tensor message = unit.grad;
    if (narrow_messages()) message = sum->message = unit.grad.to(options_.reduce);
    const DType dtype = message.dtype();
    if (narrow_messages() && adds_narrow_itself()) {
      sum->received = Tensor::empty(message.shape(), dtype, *device_);
      sum->pieces = c.all_to_all(message.raw(), sum->received.raw(), unit.piece, dtype);
    } else if (options_.sharding.optimizer) {
      sum->pieces = c.reduce_scatter(message.raw(), message.narrow(0, unit.piece_begin, unit.piece).raw(), unit.piece, dtype);
    } else {
      sum->pieces = c.all_reduce(message.raw(), unit.size, dtype);
    }
  }
  summing_.push_back(std::move(sum));
  // Narrow copies are held no longer than they must, and replicas come after the pieces: in the order of units on every rank.
  if (!narrow_messages() && !replicas()) return;
  for (std::size_t i = 0; i < summing_.size(); ++i) {
    Summing& s = *summing_[i];
    if (!s.pieces_ended && i + most_ahead >= summing_.size()) continue;
    end_pieces(s);
    if (!units_[s.unit]->across_stages) start_replicas(s);
  }
}

/// Waits, on the device, for the sum over the pieces' ranks.
void Engine::end_pieces(Summing& sum) {
  if (std::exchange(sum.pieces_ended, true)) return;
  Unit& unit = *units_[sum.unit];
  sum.pieces.wait();
  if (!sum.message.defined()) return;
  if (sum.received.defined()) {
    const Tensor mine = unit.piece_grad();
    add_narrow(sum.received.raw(), mine);
    if (!options_.sharding.optimizer) {
      const Tensor narrow = mine.to(sum.message.dtype());
      comm("shard+context", "reduce").all_gather(narrow.raw(), sum.message.raw(), unit.piece, narrow.dtype()).wait();
      unit.grad.copy_from(sum.message);
    }
  } else if (options_.sharding.optimizer) {
    unit.piece_grad().copy_from(sum.message.narrow(0, unit.piece_begin, unit.piece));
  } else {
    unit.grad.copy_from(sum.message);
  }
  sum.message = sum.received = Tensor();
}

/// Over what pieces' ranks, and stages that share a parameter, have summed.
void Engine::start_replicas(Summing& sum) {
  if (!replicas() || std::exchange(sum.replicas_started, true)) return;
  const Tensor g = units_[sum.unit]->region_grad();
  sum.replicas = comm("replicate", "reduce").all_reduce(g.raw(), g.numel(), g.dtype());
}

void Engine::end_sums() {
  for (const auto& sum : summing_) end_pieces(*sum);
  std::vector<Handle> handles;
  for (const auto& sum : summing_) {  // every stage that uses a tied parameter has a part of its gradient
    const Unit& unit = *units_[sum->unit];
    const Tensor g = unit.region_grad();
    if (unit.across_stages) handles.push_back(unit.across_stages->all_reduce(g.raw(), g.numel(), g.dtype()));
  }
  for (Handle& h : handles) h.wait();
  for (const auto& sum : summing_) start_replicas(*sum);
  for (const auto& sum : summing_)
    if (sum->replicas_started) sum->replicas.wait();
  summing_.clear();
}

void Engine::settle() {
  while (!reducing_.empty()) settle_oldest();
  end_sums();
}

void Engine::finish_gradients() {
  if (finished_) return;
  finished_ = true;
  while (!reducing_.empty()) settle_oldest();
  for (std::size_t u = 0; u < units_.size(); ++u) {
    if (options_.sharding.gradient && !std::exchange(gradient_[u].state.filled, true)) units_[u]->grad.fill(0);
    if (!gradient_[u].state.summed) start_sum(u);
  }
  end_sums();
}

std::vector<GradientState> Engine::gradient_states() const {
  std::vector<GradientState> states;
  for (const Gradient& g : gradient_) states.push_back(g.state);
  return states;
}

void Engine::abandon_walk(const std::vector<GradientState>& states) {
  reducing_.clear(), summing_.clear();  // handles wait
  for (std::size_t u = 0; u < units_.size(); ++u) {
    if (options_.sharding.parameter) {
      gathered_[u] = {};
      for (const UnitParameter& p : units_[u]->parameters) p.parameter->forget_derived();
      units_[u]->whole.storage()->data = nullptr;
    }
    if (options_.sharding.gradient) units_[u]->whole_grad.storage()->data = nullptr;
    gradient_[u] = {std::nullopt, states[u], 0};
  }
  if (gather_pool_) gather_pool_->give_all();
  if (gradient_pool_) gradient_pool_->give_all();
}

void Engine::discard() {
  settle();
  for (std::size_t u = 0; u < units_.size(); ++u) {
    gradient_[u].state = {};
    for (const UnitParameter& p : units_[u]->parameters)
      if (p.parameter->trainable()) p.parameter->leaf()->clear();
  }
  finished_ = false;  // what is reduced next is nothing: zeros
}

}  // namespace capstan
