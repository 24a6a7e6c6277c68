// What others see of the engine's contents: checkpoints their boxes of it, a sampler the whole model.
#include "engine/internal.h"

#include "engine/boxes.h"

#include <kernels/backend.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace capstan {

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
    const DType type = held_type(options_);
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
