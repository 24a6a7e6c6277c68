// A look whether ranks that should hold equal parameters do: a flipped bit would go on for ever, unseen, on one of them.
#include "engine/engine.h"

#include <fmt/format.h>
#include <kernels/backend.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <utility>

namespace capstan {

namespace {

/// Sum over elements of a mix of their bits and their index: what several ranks hold of a tensor adds up to the whole's, however
/// it is cut.
std::uint64_t fingerprint(const Tensor& flat, std::int64_t first) {
  return flat.device().backend().fingerprint(static_cast<kernels::Num>(flat.dtype()), flat.numel(), flat.raw(), static_cast<std::uint64_t>(first));
}

/// Places in `all` (one number a rank) that are not of the most frequent value; of two that differ both.
std::vector<int> odd_ones(const std::vector<std::uint64_t>& all) {
  std::map<std::uint64_t, int> votes;
  for (const std::uint64_t v : all) ++votes[v];
  if (votes.size() == 1) return {};
  const auto most = std::max_element(votes.begin(), votes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  const bool clear = std::count_if(votes.begin(), votes.end(), [&](const auto& v) { return v.second == most->second; }) == 1;
  std::vector<int> odd;
  for (std::size_t r = 0; r < all.size(); ++r)
    if (!clear || all[r] != most->first) odd.push_back(static_cast<int>(r));
  return odd;
}

}  // namespace

std::string Engine::disagreement() {
  if (!mesh_ || device_->kind() == DeviceKind::meta) return "";
  std::string found;
  /// Compares one number per name over the ranks of `among`.
  const auto compare = [&](Communicator& among, const std::vector<std::pair<std::string, std::uint64_t>>& mine) {
    if (among.size() == 1 || mine.empty()) return;
    std::vector<std::uint64_t> send, all(mine.size() * static_cast<std::size_t>(among.size()));
    for (const auto& [name, value] : mine) send.push_back(value);
    among.all_gather(send.data(), all.data(), static_cast<std::int64_t>(send.size()), DType::i64).wait();
    for (std::size_t n = 0; n < mine.size() && found.empty(); ++n) {
      std::vector<std::uint64_t> values;
      for (int r = 0; r < among.size(); ++r) values.push_back(all[static_cast<std::size_t>(r) * mine.size() + n]);
      const std::vector<int> odd = odd_ones(values);
      if (odd.empty()) continue;
      std::string ranks;
      for (const int r : odd) ranks += (ranks.empty() ? "" : ", ") + std::to_string(among.ranks()[static_cast<std::size_t>(r)]);
      found = fmt::format("{} differs on rank{} {} ({} ranks should hold the same)", mine[n].first, odd.size() > 1 ? "s" : "", ranks, among.size());
    }
  };
  const auto of_parts = [&](const Unit& unit, std::vector<std::pair<std::string, std::uint64_t>>& to) {
    for (std::size_t p = 0; p < unit.parts.size(); ++p) {
      const UnitPart& part = unit.parts[p];
      to.emplace_back(unit.parameters[part.index].parameter->name(), fingerprint(unit.part(unit.master, p).view(Dims{part.size()}), part.begin));
    }
  };

  // 1. The same pieces of the masters along replicate, and along shard and context where each rank has all of them.
  std::vector<std::pair<std::string, std::uint64_t>> masters, copies, stages;
  for (const auto& unit : units_) of_parts(*unit, masters);
  compare(host(options_.sharding.optimizer ? "replicate" : "replicate+shard+context", "check"), masters);
  // 2. Whole working copies that were gathered from pieces.
  if (options_.sharding.optimizer && !options_.sharding.parameter) {
    for (const auto& unit : units_)
      for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
        const UnitParameter& p = unit->parameters[i];
        copies.emplace_back(p.parameter->name(), fingerprint(unit->whole.narrow(0, p.offset, p.numel()), 0));
      }
    compare(host("shard+context", "check"), copies);
  }
  // 3. Runs that several tensor ranks hold: summed over the pieces first, since pieces are cut elsewhere on each.
  if (tensor_ > 1) {
    std::map<int, std::vector<std::pair<std::string, std::uint64_t>>> by_ways;
    for (const auto& unit : units_)
      for (std::size_t i = 0; i < unit->parameters.size(); ++i) {
        const UnitParameter& p = unit->parameters[i];
        const int d = std::max(p.placement->dim, 0);
        std::int64_t row = 1;
        for (int k = d; k < p.shape.size(); ++k) row *= p.shape[k];
        row /= p.shape[d];
        std::int64_t at = 0;
        for (const Run& run : p.placement->runs) {
          const std::int64_t begin = at * row, end = (at + run.length) * row;
          at += run.length;
          if (run.ways == p.placement->size || d != 0) continue;
          std::uint64_t sum = 0;
          for (std::size_t part = 0; part < unit->parts.size(); ++part) {
            const UnitPart& q = unit->parts[part];
            const std::int64_t from = std::max(begin, q.begin), until = std::min(end, q.end);
            if (q.index == i && from < until)
              sum += fingerprint(unit->part(unit->master, part).view(Dims{q.size()}).narrow(0, from - q.begin, until - from), from - begin);
          }
          by_ways[run.ways].emplace_back(p.parameter->name(), sum);
        }
      }
    for (auto& [ways, values] : by_ways) {
      std::vector<std::int64_t> sums;
      for (const auto& [name, value] : values) sums.push_back(std::bit_cast<std::int64_t>(value));
      if (options_.sharding.optimizer)
        host("shard+context", "check").all_reduce(sums.data(), static_cast<std::int64_t>(sums.size()), DType::i64).wait();
      for (std::size_t n = 0; n < sums.size(); ++n) values[n].second = std::bit_cast<std::uint64_t>(sums[n]);
      compare(mesh_->host_tensor_replicas(ways), values);
    }
  }
  // 4. Parameters that several pipeline stages hold.
  for (const auto& unit : units_) {
    if (!unit->across_stages) continue;
    stages.clear();
    of_parts(*unit, stages);
    compare(*unit->hosts_across_stages, stages);
  }
  // All ranks hear of the first.
  Communicator& all = host("pp+replicate+shard+context+tensor", "control");
  std::int64_t who = found.empty() ? all.size() : all.rank();
  all.all_reduce(&who, 1, DType::i64, Reduction::min).wait();
  if (who == all.size()) return "";
  std::array<char, 512> text{};
  std::strncpy(text.data(), found.c_str(), text.size() - 1);
  all.broadcast(text.data(), static_cast<std::int64_t>(text.size()), DType::u8, static_cast<int>(who)).wait();
  return text.data();
}

}  // namespace capstan
