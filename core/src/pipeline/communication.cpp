// Puts sends and receives into a table of compute actions.
#include "pipeline/schedule.h"
#include "pipeline/simulate.h"

#include <algorithm>
#include <utility>

namespace capstan::pipeline {

Schedule without_communication(const Schedule& schedule) {
  Schedule bare = schedule;
  for (auto& row : bare.rows) row.erase(std::remove_if(row.begin(), row.end(), [](const Action& a) { return !a.computes(); }), row.end());
  return bare;
}

Schedule with_communication(const Schedule& schedule) {
  Schedule result = without_communication(schedule);
  const Simulation clock = simulate(result);
  const std::vector<int> place = rank_of_stage(result);
  // By the time they end: what depends on an action ends after it. A pair of send and receive stands behind its action in
  // that one order on both ranks, so the order itself is a way to run everything, even one at a time.
  struct Event { double end; std::size_t rank; Action action; };
  std::vector<Event> events;
  for (std::size_t r = 0; r < result.rows.size(); ++r)
    for (const TimedAction& t : clock.timeline[r]) events.push_back({t.end, r, t.action});
  std::stable_sort(events.begin(), events.end(), [](const Event& a, const Event& b) { return a.end < b.end; });
  for (auto& row : result.rows) row.clear();
  for (const Event& e : events) {
    const Action& a = e.action;
    result.rows[e.rank].push_back(a);
    const bool forward = a.kind == ActionKind::forward;
    const int to = forward ? a.stage + 1 : a.stage - 1;
    if (a.kind == ActionKind::weight || to < 0 || to >= result.stages) continue;
    const int peer = place[static_cast<std::size_t>(to)];
    if (peer == static_cast<int>(e.rank)) continue;
    result.rows[e.rank].push_back({forward ? ActionKind::send_forward : ActionKind::send_backward, a.stage, a.microbatch});
    result.rows[static_cast<std::size_t>(peer)].push_back({forward ? ActionKind::receive_forward : ActionKind::receive_backward, to, a.microbatch});
  }
  return result;
}

}  // namespace capstan::pipeline
