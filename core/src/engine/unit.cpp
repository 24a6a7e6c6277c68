#include "engine/unit.h"

#include <algorithm>

namespace capstan {

void Unit::add(Parameter* parameter, std::shared_ptr<const TensorPlacement> placement) {
  UnitParameter p;
  p.parameter = parameter;
  p.shape = placement ? placement->local : parameter->shape();
  p.placement = std::move(placement);
  p.offset = size;
  size += round_up(p.numel());
  parameters.push_back(std::move(p));
}

std::vector<UnitPart> Unit::parts_in(std::int64_t begin, std::int64_t end) const {
  std::vector<UnitPart> found;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const std::int64_t from = std::max(begin, parameters[i].offset), until = std::min(end, parameters[i].offset + parameters[i].numel());
    if (from < until) found.push_back({i, from - parameters[i].offset, until - parameters[i].offset});
  }
  return found;
}

void Unit::cut(int pieces, int rank, bool optimizer_in_pieces) {
  piece = round_up((size + pieces - 1) / pieces);
  size = piece * pieces;
  piece_begin = piece * rank;
  region_begin = optimizer_in_pieces ? piece_begin : 0;
  region = optimizer_in_pieces ? piece : size;
  parts = parts_in(region_begin, region_begin + region);

  // Runs of the piece that are ours to count. Padding is zero and counts with what stands before it.
  const auto count = [&](std::int64_t begin, std::int64_t end) {
    begin = std::max(begin, piece_begin) - piece_begin, end = std::min(end, piece_begin + piece) - piece_begin;
    if (begin >= end) return;
    if (!counted_.empty() && counted_.back().second == begin) counted_.back().second = end;
    else counted_.emplace_back(begin, end);
  };
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const UnitParameter& p = parameters[i];
    const std::int64_t end = i + 1 < parameters.size() ? parameters[i + 1].offset : size;
    if (!p.placement) {
      count(p.offset, end);
      continue;
    }
    const auto& runs = p.placement->runs;
    const bool all = std::all_of(runs.begin(), runs.end(), [&](const Run& r) { return p.placement->owns(r); });
    const bool none = std::none_of(runs.begin(), runs.end(), [&](const Run& r) { return p.placement->owns(r); });
    replicated_ |= std::any_of(runs.begin(), runs.end(), [&](const Run& r) { return r.ways < p.placement->size; });
    if (all) {
      count(p.offset, end);
    } else if (!none) {
      if (p.placement->dim != 0)
        fail(Fault::programming, p.parameter->name(), "runs of dimension " + std::to_string(p.placement->dim) + " are held by different numbers of ranks: only dimension 0 may be so");
      const std::int64_t row = p.numel() / p.shape[0];
      std::int64_t at = p.offset;
      for (const Run& r : runs) {
        if (p.placement->owns(r)) count(at, at + r.length * row);
        at += r.length * row;
      }
    }
  }
}

Tensor Unit::view(const Tensor& flat, std::size_t i) const {
  return flat.narrow(0, parameters[i].offset, parameters[i].numel()).view(parameters[i].shape);
}

Tensor Unit::part(const Tensor& flat, std::size_t p) const {
  const UnitPart& part = parts[p];
  const UnitParameter& owner = parameters[part.index];
  const Tensor t = flat.narrow(0, owner.offset + part.begin - region_begin, part.size());
  return part.size() == owner.numel() ? t.view(owner.shape) : t;
}

Tensor Unit::state(const std::string& name, std::size_t p) const {
  for (const UnitState& s : states) {
    if (s.name != name) continue;
    for (const auto& [index, offset] : s.offsets) {
      if (index != p) continue;
      const Tensor t = s.flat.narrow(0, offset, parts[p].size());
      return parts[p].size() == parameters[parts[p].index].numel() ? t.view(parameters[parts[p].index].shape) : t;
    }
  }
  fail(Fault::programming, parameters[parts[p].index].parameter->name(), "its optimizer has no state '" + name + "'");
}

}  // namespace capstan
