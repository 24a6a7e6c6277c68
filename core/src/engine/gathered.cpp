// Where parameters are while a walk goes on: in pieces, on their way, or whole for the calls that use them.
#include "engine/engine.h"

#include "model/call_run.h"

#include <kernels/backend.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace capstan {

namespace {

bool contains(const std::vector<std::size_t>& all, std::size_t one) { return std::find(all.begin(), all.end(), one) != all.end(); }

}  // namespace

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
  if (step != WalkStep::backward && step != WalkStep::weight) return;
  for (const std::size_t u : call_units_[c]) {
    const bool last = gradient_[u].uses_left > 0 && --gradient_[u].uses_left == 0 && !units_[u]->across_stages;
    if (options_.sharding.gradient) start_reduce(u, last);
    else if (last) start_sum(u);
  }
}

}  // namespace capstan
