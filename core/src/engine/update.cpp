// The engine's optimizer step. Rules that work element by element get this rank's pieces; rules that must see a whole
// matrix (Muon) get it gathered to one owner, which sends the pieces back.
#include "engine/engine.h"

#include "base/cuda_device.h"

#include <kernels/cpu/context.h>
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace capstan {

namespace {

/// Copies between a tensor rank's local tensor and its runs of the global one.
void copy_runs(const Tensor& local, const TensorPlacement& placement, const Tensor& global, bool to_global) {
  const int d = std::max(placement.dim, 0);
  std::int64_t at = 0;
  for (const Run& run : placement.runs) {
    const Tensor l = local.narrow(d, at, run.length), g = global.narrow(d, run.begin, run.length);
    if (to_global) g.copy_from(l);
    else l.copy_from(g);
    at += run.length;
  }
}

/// Elements of a parameter at [offset, offset + numel) that piece `rank` holds, counted within the parameter.
std::pair<std::int64_t, std::int64_t> interval(const Unit& unit, const UnitParameter& p, int rank) {
  const std::int64_t from = std::max(unit.piece * rank, p.offset), until = std::min(unit.piece * (rank + 1), p.offset + p.numel());
  return {std::min(from, until) - p.offset, until - p.offset};
}

/// Plugins open plain OpenMP regions: they get the device's threads through this thread's setting.
struct ThreadsOf {
  explicit ThreadsOf(Device& device) : before(omp_get_max_threads()) { omp_set_num_threads(device.cpu().threads()); }
  ~ThreadsOf() { omp_set_num_threads(before); }
  int before;
};

}  // namespace

void Engine::attach(std::shared_ptr<Optimizer> optimizer) {
  optimizer_ = std::move(optimizer);
  for (auto& unit : units_) {
    unit->states.clear();
    for (std::size_t p = 0; p < unit->parts.size(); ++p) {
      const Parameter& parameter = *unit->parameters[unit->parts[p].index].parameter;
      if (!parameter.trainable()) continue;
      for (const StateDecl& decl : optimizer_->state_of(parameter)) {
        const DType dtype = decl.dtype == DType::f32 ? unit->master.dtype() : decl.dtype;
        auto it = std::find_if(unit->states.begin(), unit->states.end(), [&](const UnitState& s) { return s.name == decl.name && s.dtype == dtype; });
        if (it == unit->states.end()) it = unit->states.insert(it, {decl.name, dtype, 0, {}, Tensor()});
        it->offsets.emplace_back(p, it->size);
        it->size += Unit::round_up(unit->parts[p].size());
      }
    }
    const HoldingAs holding(*device_, Holding::optimizer);
    for (UnitState& state : unit->states) state.flat = Tensor::zeros(Dims{state.size}, state.dtype, *device_);
  }
}

bool Engine::whole_rule(const Unit& unit, std::size_t i) const {
  const UnitParameter& p = unit.parameters[i];
  if (!p.parameter->trainable() || optimizer_->atomicity(*p.parameter) == Atomicity::element) return false;
  return options_.sharding.optimizer || (p.placement && p.placement->cut());
}

void Engine::update(std::int64_t step, double lr_scale, double norm, double clip) {
  apply(step, lr_scale, clip > 0 && norm > clip ? clip / norm : 1.0);
  discard();
}

void Engine::apply(std::int64_t step, double lr_scale, double grad_scale) {
  finish_gradients();
  UpdateContext u;
  u.device = device_.get();
  u.step = step;
  u.lr_scale = lr_scale;
  u.grad_scale = grad_scale;
  std::vector<UpdateItem> items;
  for (auto& unit : units_)
    for (std::size_t p = 0; p < unit->parts.size(); ++p) {
      const std::size_t i = unit->parts[p].index;
      const Parameter& parameter = *unit->parameters[i].parameter;
      if (!parameter.trainable() || whole_rule(*unit, i)) continue;
      UpdateItem item;
      item.parameter = &parameter;
      item.value = unit->part(unit->master, p);
      item.grad = unit->part(unit->region_grad(), p);
      for (const StateDecl& decl : optimizer_->state_of(parameter)) item.state.push_back(unit->state(decl.name, p));
      items.push_back(std::move(item));
    }
  {
    const auto count = static_cast<double>(parameter_count_);
    OpScope scope(*device_, "optimizer", {12 * count, 16 * count, 12 * count});
    if (!scope.meta()) {
      const ThreadsOf threads(*device_);
      optimizer_->update(u, items);
      for (auto& unit : units_) update_whole(u, *unit);
    }
  }
  publish();
}

/// Each such parameter has an owner among the ranks that hold its pieces, the least loaded one. Pieces of value, gradient
/// and state go to it, the rule runs on the whole, and value and state go back. Tensor ranks assemble the global matrix
/// beside each other and do the same work: their results are equal to the bit.
void Engine::update_whole(UpdateContext& context, Unit& unit) {
  std::vector<std::size_t> all;
  for (std::size_t i = 0; i < unit.parameters.size(); ++i)
    if (whole_rule(unit, i)) all.push_back(i);
  if (all.empty()) return;
  const int ranks = options_.sharding.optimizer ? pieces_ : 1, me = options_.sharding.optimizer ? piece_rank_ : 0;
  const DType dtype = unit.master.dtype();

  std::vector<std::size_t> by_size = all;
  std::stable_sort(by_size.begin(), by_size.end(), [&](std::size_t a, std::size_t b) { return unit.parameters[a].numel() > unit.parameters[b].numel(); });
  std::vector<std::int64_t> load(static_cast<std::size_t>(ranks), 0);
  std::vector<int> owner(unit.parameters.size(), 0);
  for (const std::size_t i : by_size) {
    const auto least = std::min_element(load.begin(), load.end());
    owner[i] = static_cast<int>(least - load.begin());
    *least += unit.parameters[i].numel();
  }

  const auto states_of = [&](std::size_t i) { return optimizer_->state_of(*unit.parameters[i].parameter); };
  /// What I hold of parameter i: value, gradient, states; empty tensors when that is nothing.
  const auto mine = [&](std::size_t i) {
    std::vector<Tensor> tensors(2 + states_of(i).size());
    for (std::size_t p = 0; p < unit.parts.size(); ++p) {
      if (unit.parts[p].index != i) continue;
      tensors[0] = unit.part(unit.master, p), tensors[1] = unit.part(unit.region_grad(), p);
      std::size_t k = 2;
      for (const StateDecl& decl : states_of(i)) tensors[k++] = unit.state(decl.name, p);
    }
    return tensors;
  };
  const auto tensors_of = [&](std::size_t i, bool back) { return static_cast<std::int64_t>((back ? 1 : 2) + states_of(i).size()); };
  const auto length = [&](std::size_t i, int rank) {
    if (ranks == 1) return unit.parameters[i].numel();
    const auto [from, until] = interval(unit, unit.parameters[i], rank);
    return until - from;
  };
  /// Elements that go from `from` to the owner `to` (or back).
  const auto elements = [&](int from, int to, bool back) {
    std::int64_t n = 0;
    for (const std::size_t i : all)
      if (owner[i] == to) n += length(i, from) * tensors_of(i, back);
    return n;
  };
  const auto counts = [&](bool mine_to_others, bool back) {
    std::vector<std::int64_t> c;
    for (int r = 0; r < ranks; ++r) c.push_back(mine_to_others ? elements(me, r, back) : elements(r, me, back));
    return c;
  };
  const auto buffer = [&](const std::vector<std::int64_t>& c) { return Tensor::empty(Dims{std::accumulate(c.begin(), c.end(), std::int64_t{0})}, dtype, *device_); };
  const auto exchange = [&](const Tensor& in, const std::vector<std::int64_t>& send, const Tensor& out, const std::vector<std::int64_t>& receive) {
    if (ranks == 1) out.copy_from(in);
    else comm("shard+context", "exchange").all_to_all_v(in.raw(), send, out.raw(), receive, dtype).wait();
  };

  // 1. Pieces to their owners.
  std::vector<std::int64_t> send = counts(true, false), receive = counts(false, false);
  Tensor out = buffer(send), in = buffer(receive);
  std::int64_t at = 0;
  for (int q = 0; q < ranks; ++q)
    for (const std::size_t i : all) {
      if (owner[i] != q) continue;
      for (const Tensor& t : mine(i)) {
        if (!t.defined()) continue;
        out.narrow(0, at, t.numel()).copy_from(t.view(Dims{t.numel()})), at += t.numel();
      }
    }
  exchange(out, send, in, receive);

  // 2. Whole local tensors, then global ones.
  struct Owned { std::size_t index; std::vector<Tensor> local, global; };
  std::vector<Owned> owned;
  for (const std::size_t i : all) {
    if (owner[i] != me) continue;
    Owned o{i, {}, {}};
    for (std::int64_t k = 0; k < tensors_of(i, false); ++k) o.local.push_back(Tensor::empty(Dims{unit.parameters[i].numel()}, dtype, *device_));
    owned.push_back(std::move(o));
  }
  at = 0;
  for (int s = 0; s < ranks; ++s)
    for (Owned& o : owned) {
      const std::int64_t n = length(o.index, s), from = ranks == 1 ? 0 : interval(unit, unit.parameters[o.index], s).first;
      for (Tensor& t : o.local) {
        if (n > 0) t.narrow(0, from, n).copy_from(in.narrow(0, at, n));
        at += n;
      }
    }
  std::vector<UpdateItem> items;
  for (Owned& o : owned) {
    const UnitParameter& p = unit.parameters[o.index];
    const Dims shape = p.parameter->shape();
    for (Tensor& t : o.local) {
      if (!p.placement || !p.placement->cut()) {
        o.global.push_back(t.view(shape));
        continue;
      }
      std::vector<TensorPlacement> placements;
      std::vector<std::int64_t> c;
      for (int r = 0; r < tensor_; ++r) placements.push_back(place_tensor(*p.parameter, tensor_, r)), c.push_back(placements.back().local.product());
      const Tensor pieces = buffer(c), whole = Tensor::empty(shape, dtype, *device_);
      comm("tensor", "exchange").all_gather_v(t.raw(), pieces.raw(), c, dtype).wait();
      std::int64_t begin = 0;
      for (int r = 0; r < tensor_; ++r) {
        const auto& placement = placements[static_cast<std::size_t>(r)];
        copy_runs(pieces.narrow(0, begin, c[static_cast<std::size_t>(r)]).view(placement.local), placement, whole, true);
        begin += c[static_cast<std::size_t>(r)];
      }
      o.global.push_back(whole);
    }
    UpdateItem item;
    item.parameter = p.parameter, item.value = o.global[0], item.grad = o.global[1];
    std::size_t k = 2;
    for (const StateDecl& decl : states_of(o.index)) {
      const DType state = decl.dtype == DType::f32 ? dtype : decl.dtype;
      item.state.push_back(o.global[k++].to(state));  // the same tensor unless it is kept narrower
    }
    items.push_back(std::move(item));
  }
  optimizer_->update(context, items);

  // 3. Values and states back to where their pieces live.
  for (std::size_t n = 0; n < owned.size(); ++n) {
    Owned& o = owned[n];
    const UnitParameter& p = unit.parameters[o.index];
    for (std::size_t k = 2; k < o.global.size(); ++k)
      if (items[n].state[k - 2].dtype() != dtype) o.global[k].copy_from(items[n].state[k - 2]);
    if (p.placement && p.placement->cut())
      for (std::size_t k = 0; k < o.local.size(); ++k) copy_runs(o.local[k].view(p.placement->local), *p.placement, o.global[k], false);
  }
  send = counts(false, true), receive = counts(true, true);
  out = buffer(send), in = buffer(receive);
  at = 0;
  for (int s = 0; s < ranks; ++s)
    for (const Owned& o : owned) {
      const std::int64_t n = length(o.index, s), from = ranks == 1 ? 0 : interval(unit, unit.parameters[o.index], s).first;
      for (std::size_t k = 0; k < o.local.size(); ++k) {
        if (k == 1) continue;  // the gradient stays
        if (n > 0) out.narrow(0, at, n).copy_from(o.local[k].narrow(0, from, n));
        at += n;
      }
    }
  exchange(out, send, in, receive);
  at = 0;
  for (int q = 0; q < ranks; ++q)
    for (const std::size_t i : all) {
      if (owner[i] != q) continue;
      const std::vector<Tensor> tensors = mine(i);
      for (std::size_t k = 0; k < tensors.size(); ++k) {
        if (k == 1 || !tensors[k].defined()) continue;
        const Tensor t = tensors[k].view(Dims{tensors[k].numel()});
        t.copy_from(in.narrow(0, at, t.numel())), at += t.numel();
      }
    }
}

Tensor Engine::assemble(const Unit& unit, std::size_t i, const Tensor& flat) const {
  const UnitParameter& p = unit.parameters[i];
  Tensor whole = flat;
  if (flat.numel() != unit.size) {
    whole = Tensor::empty(Dims{unit.size}, flat.dtype(), *device_);
    comm("shard+context", "exchange").all_gather(flat.raw(), whole.raw(), unit.piece, flat.dtype()).wait();
  }
  const Tensor local = unit.view(whole, i).clone();
  if (!p.placement || !p.placement->cut()) return local;
  const Tensor global = Tensor::empty(p.parameter->shape(), flat.dtype(), *device_);
  std::vector<std::int64_t> c;
  std::vector<TensorPlacement> placements;
  for (int r = 0; r < tensor_; ++r) placements.push_back(place_tensor(*p.parameter, tensor_, r)), c.push_back(placements.back().local.product());
  const Tensor pieces = Tensor::empty(Dims{std::accumulate(c.begin(), c.end(), std::int64_t{0})}, flat.dtype(), *device_);
  comm("tensor", "exchange").all_gather_v(local.raw(), pieces.raw(), c, flat.dtype()).wait();
  std::int64_t begin = 0;
  for (int r = 0; r < tensor_; ++r) {
    const auto n = c[static_cast<std::size_t>(r)];
    copy_runs(pieces.narrow(0, begin, n).view(placements[static_cast<std::size_t>(r)].local), placements[static_cast<std::size_t>(r)], global, true);
    begin += n;
  }
  return global;
}

Tensor Engine::whole_gradient(const Parameter& parameter) {
  finish_gradients();
  for (const auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i)
      if (unit->parameters[i].parameter == &parameter) return assemble(*unit, i, options_.sharding.optimizer ? unit->piece_grad() : unit->grad);
  return {};
}

Tensor Engine::whole_value(const Parameter& parameter) {
  for (const auto& unit : units_)
    for (std::size_t i = 0; i < unit->parameters.size(); ++i)
      if (unit->parameters[i].parameter == &parameter) return assemble(*unit, i, unit->master);
  return {};
}

}  // namespace capstan
