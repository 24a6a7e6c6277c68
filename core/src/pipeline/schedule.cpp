// Makes the tables: who computes what in which order. All have any number of microbatches.
#include "pipeline/schedule.h"

#include <capstan/error.h>

#include <algorithm>
#include <array>
#include <deque>
#include <utility>

namespace capstan::pipeline {

namespace {

using Row = std::vector<Action>;
using Rows = std::vector<Row>;
constexpr std::array<std::string_view, 4> kind_names{"gpipe", "1f1b", "interleaved", "zero_bubble"};

void check(const Plan& plan, int microbatches) {
  const auto refuse = [&](const std::string& what) { fail(Fault::input, "pipeline", std::string(name_of(plan.kind)) + ": " + what); };
  if (plan.ranks < 1) refuse("expected at least 1 rank, got " + std::to_string(plan.ranks));
  if (plan.stages_per_rank < 1) refuse("expected at least 1 stage a rank, got " + std::to_string(plan.stages_per_rank));
  if (microbatches < 1) refuse("expected at least 1 microbatch, got " + std::to_string(microbatches));
  if (plan.kind == ScheduleKind::one_f_one_b && plan.stages_per_rank > 1)
    refuse("it has one stage a rank, got " + std::to_string(plan.stages_per_rank) + ": take the schedule interleaved or zero_bubble");
  if (plan.kind == ScheduleKind::interleaved && plan.stages_per_rank < 2)
    refuse("it needs at least 2 stages a rank, got " + std::to_string(plan.stages_per_rank) + ": raise stages_per_rank, or take the schedule 1f1b");
}

/// Sizes of the groups of microbatches that go through one stage of the rank after the other: as many as ranks, or a few
/// more where that does not divide, so that a group never waits for its own head to come around.
std::vector<int> groups(const Plan& plan, int microbatches) {
  const int rounds = std::max(1, microbatches / plan.ranks);
  std::vector<int> sizes;
  for (int i = 0; i < rounds; ++i) sizes.push_back(microbatches / rounds + (i < microbatches % rounds ? 1 : 0));
  return sizes;
}

/// (stage of the rank, microbatch) in the order of forwards; backwards take the stages of a group the other way.
std::vector<std::pair<int, int>> visits(const Plan& plan, int microbatches, bool reversed) {
  std::vector<std::pair<int, int>> order;
  int begin = 0;
  for (const int size : groups(plan, microbatches)) {
    for (int s = 0; s < plan.stages_per_rank; ++s)
      for (int m = begin; m < begin + size; ++m) order.emplace_back(reversed ? plan.stages_per_rank - 1 - s : s, m);
    begin += size;
  }
  return order;
}

Row one_by_one(const Plan& plan, int microbatches, int rank) {
  const auto forwards = visits(plan, microbatches, false), backwards = visits(plan, microbatches, true);
  // What has to be on its way before the first gradient can be back: with several stages a rank, the largest group through
  // all but the last of them, and two steps for each rank that follows, since its forwards and backwards take turns.
  const int following = plan.ranks - 1 - rank, several = plan.stages_per_rank - 1;
  const int first = several == 0 ? following : 2 * following + several * groups(plan, microbatches).front();
  const std::size_t warm = std::min(forwards.size(), static_cast<std::size_t>(first));
  Row row;
  const auto add = [&](ActionKind kind, std::pair<int, int> visit) { row.push_back({kind, visit.first * plan.ranks + rank, visit.second}); };
  for (std::size_t i = 0; i < warm; ++i) add(ActionKind::forward, forwards[i]);
  for (std::size_t i = warm; i < forwards.size(); ++i) add(ActionKind::forward, forwards[i]), add(ActionKind::backward, backwards[i - warm]);
  for (std::size_t i = forwards.size() - warm; i < backwards.size(); ++i) add(ActionKind::backward, backwards[i]);
  return row;
}

Row all_then_all(const Plan& plan, int microbatches, int rank) {
  Row row;
  for (int s = 0; s < plan.stages_per_rank; ++s)
    for (int m = 0; m < microbatches; ++m) row.push_back({ActionKind::forward, s * plan.ranks + rank, m});
  for (int s = plan.stages_per_rank - 1; s >= 0; --s)
    for (int m = 0; m < microbatches; ++m) row.push_back({ActionKind::backward, s * plan.ranks + rank, m});
  return row;
}

int most_live(const Row& row) {
  int live = 0, most = 0;
  for (const Action& a : row) {
    if (a.kind == ActionKind::forward) most = std::max(most, ++live);
    if (a.kind == ActionKind::backward) --live;
  }
  return most;
}

/// Splits backwards in two. A clock of steps (forward, input and weight take one each) says when a rank would wait: then,
/// and when it holds as many microbatches as rank 0 must anyway, it computes the oldest weight gradients that are left.
Rows defer_weights(const Rows& rows, const Plan& plan, int microbatches) {
  const auto stages = static_cast<std::size_t>(plan.stages());
  int limit = 0;
  for (const Row& row : rows) limit = std::max(limit, most_live(row));
  constexpr int never = 1 << 30;
  const auto grid = [&] { return std::vector<std::vector<int>>(stages, std::vector<int>(static_cast<std::size_t>(microbatches), never)); };
  auto forward_done = grid(), input_done = grid();  // step at whose start the value is there
  struct State { std::size_t next = 0; std::deque<Action> weights; int live = 0; };
  std::vector<State> states(rows.size());
  Rows result(rows.size());
  std::size_t left = rows.size();
  for (int now = 0; left > 0; ++now) {
    bool busy = false;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      State& state = states[r];
      const bool some = state.next < rows[r].size();
      if (!some && state.weights.empty()) continue;
      bool go = some;
      if (some) {
        const Action& a = rows[r][state.next];
        const auto s = static_cast<std::size_t>(a.stage), m = static_cast<std::size_t>(a.microbatch);
        if (a.kind == ActionKind::forward) go = (s == 0 || forward_done[s - 1][m] <= now) && (state.live < limit || state.weights.empty());
        else go = forward_done[s][m] <= now && (s + 1 == stages || input_done[s + 1][m] <= now);
        if (go) {
          state.live += a.kind == ActionKind::forward;
          if (a.kind == ActionKind::forward) forward_done[s][m] = now + 1;
          else input_done[s][m] = now + 1, state.weights.push_back({ActionKind::weight, a.stage, a.microbatch});
          result[r].push_back({a.kind == ActionKind::forward ? a.kind : ActionKind::input, a.stage, a.microbatch});
          ++state.next;
          busy = true;
        }
      }
      if (!go && !state.weights.empty()) {
        result[r].push_back(state.weights.front());
        state.weights.pop_front();
        --state.live;
        busy = true;
      }
      left -= state.next == rows[r].size() && state.weights.empty();
    }
    // Every action takes one step: what waits now waits for what runs now.
    if (!busy && left > 0) fail(Fault::programming, "pipeline", "zero_bubble: deadlock while the table was made, at step " + std::to_string(now));
  }
  // Nobody waits for the first stage's input part: where its weight part follows, they are one.
  for (Row& row : result)
    for (std::size_t i = 0; i + 1 < row.size(); ++i)
      if (row[i].kind == ActionKind::input && row[i].stage == 0 && row[i + 1] == Action{ActionKind::weight, 0, row[i].microbatch}) {
        row[i].kind = ActionKind::backward;
        row.erase(row.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      }
  return result;
}

}  // namespace

std::string_view name_of(ScheduleKind kind) { return kind_names[static_cast<std::size_t>(kind)]; }

ScheduleKind schedule_kind(std::string_view name) {
  for (std::size_t i = 0; i < kind_names.size(); ++i)
    if (kind_names[i] == name) return static_cast<ScheduleKind>(i);
  const std::string near = nearest(std::string(name), kind_names);
  fail(Fault::input, "pipeline", "unknown schedule '" + std::string(name) + "': there are gpipe, 1f1b, interleaved, zero_bubble" +
                                     (near.empty() ? "" : "; did you mean " + near + "?"));
}

Schedule make_schedule(const Plan& plan, int microbatches) {
  check(plan, microbatches);
  Schedule schedule{std::string(name_of(plan.kind)), plan.ranks, plan.stages(), microbatches, true, {}};
  for (int rank = 0; rank < plan.ranks; ++rank)
    schedule.rows.push_back(plan.kind == ScheduleKind::gpipe ? all_then_all(plan, microbatches, rank) : one_by_one(plan, microbatches, rank));
  if (plan.kind == ScheduleKind::zero_bubble) schedule.rows = defer_weights(schedule.rows, plan, microbatches);
  return with_communication(schedule);
}

Schedule make_forward_schedule(const Plan& plan, int microbatches) {
  check(plan, microbatches);
  Schedule schedule{"forward", plan.ranks, plan.stages(), microbatches, false, {}};
  for (int rank = 0; rank < plan.ranks; ++rank) {
    Row& row = schedule.rows.emplace_back();
    for (const auto& [s, m] : visits(plan, microbatches, false)) row.push_back({ActionKind::forward, s * plan.ranks + rank, m});
  }
  return with_communication(schedule);
}

std::vector<int> rank_of_stage(const Schedule& schedule) {
  std::vector<int> ranks(static_cast<std::size_t>(schedule.stages), -1);
  for (std::size_t r = 0; r < schedule.rows.size(); ++r)
    for (const Action& a : schedule.rows[r])
      if (a.kind == ActionKind::forward && a.stage >= 0 && a.stage < schedule.stages) {
        int& rank = ranks[static_cast<std::size_t>(a.stage)];
        if (rank < 0) rank = static_cast<int>(r);
      }
  return ranks;
}

}  // namespace capstan::pipeline
