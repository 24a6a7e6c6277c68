// Runs a table against a clock.
#include "pipeline/simulate.h"

#include <capstan/error.h>

#include <algorithm>
#include <cstdio>

namespace capstan::pipeline {

namespace {

double cost_of(const std::vector<double>& costs, int stage, int stages, const char* what) {
  if (costs.size() == 1) return costs[0];
  if (costs.size() != static_cast<std::size_t>(stages))
    fail(Fault::programming, "pipeline", std::string("costs of ") + what + ": expected 1 or " + std::to_string(stages) + " numbers, got " + std::to_string(costs.size()));
  return costs[static_cast<std::size_t>(stage)];
}

}  // namespace

Simulation simulate(const Schedule& schedule, const Costs& costs) {
  const auto stages = static_cast<std::size_t>(schedule.stages), microbatches = static_cast<std::size_t>(schedule.microbatches);
  const std::vector<int> place = rank_of_stage(schedule);
  std::vector<double> forward_end(stages * microbatches, -1), input_end(stages * microbatches, -1);
  const auto at = [&](int stage, int m) { return static_cast<std::size_t>(stage) * microbatches + static_cast<std::size_t>(m); };

  Simulation sim{schedule.name, schedule.ranks, schedule.stages, schedule.microbatches, 0, 0, {}, {}, {}};
  const std::size_t ranks = schedule.rows.size();
  sim.busy.assign(ranks, 0), sim.live.assign(ranks, 0), sim.timeline.resize(ranks);
  std::vector<std::size_t> next(ranks, 0);
  std::vector<double> now(ranks, 0);
  std::vector<int> live(ranks, 0);

  // Time at which `a` may start as far as other actions go; below 0: one of them has not run.
  const auto ready = [&](const Action& a, int rank) {
    const auto from = [&](const std::vector<double>& ends, int stage) {
      const double end = ends[at(stage, a.microbatch)];
      return end < 0 ? -1 : end + (place[static_cast<std::size_t>(stage)] == rank ? 0 : costs.latency);
    };
    if (a.kind == ActionKind::forward) return a.stage == 0 ? 0.0 : from(forward_end, a.stage - 1);
    if (a.kind == ActionKind::weight) return from(input_end, a.stage);
    const double own = from(forward_end, a.stage);
    if (own < 0 || a.stage + 1 == schedule.stages) return own;
    const double later = from(input_end, a.stage + 1);
    return later < 0 ? -1 : std::max(own, later);
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t r = 0; r < ranks; ++r) {
      for (; next[r] < schedule.rows[r].size(); ++next[r]) {
        const Action& a = schedule.rows[r][next[r]];
        if (a.stage < 0 || a.stage >= schedule.stages || a.microbatch < 0 || a.microbatch >= schedule.microbatches)
          fail(Fault::input, "pipeline", "rank " + std::to_string(r) + ": " + to_string(a) + " is outside the schedule");
        if (!a.computes()) continue;
        const double can = ready(a, static_cast<int>(r));
        if (can < 0) break;
        const double f = cost_of(costs.forward, a.stage, schedule.stages, "forward"), i = cost_of(costs.input, a.stage, schedule.stages, "input"),
                     w = cost_of(costs.weight, a.stage, schedule.stages, "weight");
        const double cost = a.kind == ActionKind::forward ? f : a.kind == ActionKind::input ? i : a.kind == ActionKind::weight ? w : i + w;
        const double begin = std::max(now[r], can), end = begin + cost;
        if (a.kind == ActionKind::forward) forward_end[at(a.stage, a.microbatch)] = end, sim.live[r] = std::max(sim.live[r], ++live[r]);
        if (a.kind == ActionKind::backward || a.kind == ActionKind::input) input_end[at(a.stage, a.microbatch)] = end;
        if (a.kind == ActionKind::backward || a.kind == ActionKind::weight) --live[r];
        sim.timeline[r].push_back({a, begin, end});
        sim.busy[r] += cost;
        now[r] = end;
        moved = true;
      }
    }
  }
  double busy = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    if (next[r] < schedule.rows[r].size())
      fail(Fault::input, "pipeline", "deadlock: rank " + std::to_string(r) + " cannot start " + to_string(schedule.rows[r][next[r]]) +
                                         " (action " + std::to_string(next[r]) + "): what it needs never comes");
    sim.makespan = std::max(sim.makespan, now[r]);
    busy += sim.busy[r];
  }
  sim.bubble = sim.makespan > 0 ? 1 - busy / (sim.makespan * static_cast<double>(ranks)) : 0;
  return sim;
}

std::string describe(const Simulation& s) {
  char bubble[32];
  std::snprintf(bubble, sizeof bubble, "%.1f%%", 100 * s.bubble);
  const int per_rank = s.stages / std::max(1, s.ranks);
  std::string text = s.name + " over " + std::to_string(s.ranks) + (s.ranks == 1 ? " rank" : " ranks") +
                     (per_rank > 1 ? " of " + std::to_string(per_rank) + " stages" : "") + ", " + std::to_string(s.microbatches) +
                     (s.microbatches == 1 ? " microbatch: " : " microbatches: ") + bubble + " bubble, live microbatches";
  if (per_rank > 1) text += " (each stage's)";
  if (s.live.size() <= 16) {
    for (const int live : s.live) text += " " + std::to_string(live);
  } else {
    const auto [least, most] = std::minmax_element(s.live.begin(), s.live.end());
    text += " " + std::to_string(*least) + " to " + std::to_string(*most);
  }
  return text;
}

}  // namespace capstan::pipeline
