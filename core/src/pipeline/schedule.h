// defines: Action, Schedule, Plan, make_schedule(), validate(), to_text(): pipeline schedules as tables of actions.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::pipeline {

/// What a rank does to one microbatch at one stage. The stage is that of the one who acts: `send_forward` sends what the
/// stage wrote to the next stage, `receive_forward` takes what it reads from the one before; `send_backward` sends the
/// gradient of what it read, `receive_backward` takes that of what it wrote.
enum class ActionKind : std::uint8_t {
  forward, backward,  ///< backward: input and weight at once
  input, weight,      ///< the gradients of what the stage read; of its parameters
  send_forward, receive_forward, send_backward, receive_backward
};

struct Action {
  ActionKind kind = ActionKind::forward;
  int stage = 0, microbatch = 0;
  bool operator==(const Action&) const = default;
  bool computes() const { return kind <= ActionKind::weight; }
};

/// "2F5" (stage 2, forward, microbatch 5); kinds are F, B, I, W, SF, RF, SB, RB.
CAPSTAN_API std::string to_string(const Action& action);

/// One row of actions for each rank, run in order. Sends and receives are there between stages on different ranks.
struct Schedule {
  std::string name;
  int ranks = 1, stages = 1, microbatches = 1;
  bool backward = true;  ///< false: an evaluation, forwards alone
  std::vector<std::vector<Action>> rows;
  bool operator==(const Schedule&) const = default;
};

enum class ScheduleKind : std::uint8_t {
  gpipe,        ///< all forwards, then all backwards (Huang et al. 2019)
  one_f_one_b,  ///< a backward as soon as there is one (Harlap et al. 2018; Narayanan et al. 2021)
  interleaved,  ///< the same with several stages a rank (Narayanan et al. 2021)
  zero_bubble,  ///< weight gradients fill the gaps, within the memory of rank 0 (ZB-H1; Qi et al. 2023)
};
CAPSTAN_API std::string_view name_of(ScheduleKind kind);
/// By its name: gpipe, 1f1b, interleaved, zero_bubble. Error(input).
CAPSTAN_API ScheduleKind schedule_kind(std::string_view name);

/// What a recipe says. Stage s is on rank s mod ranks.
struct Plan {
  ScheduleKind kind = ScheduleKind::one_f_one_b;
  int ranks = 1, stages_per_rank = 1;
  int stages() const { return ranks * stages_per_rank; }
};

/// Any number of microbatches from 1. Error(input): 1f1b with more than one stage a rank, interleaved with one, counts
/// below 1.
CAPSTAN_API Schedule make_schedule(const Plan& plan, int microbatches);
/// Forwards alone.
CAPSTAN_API Schedule make_forward_schedule(const Plan& plan, int microbatches);

/// The same without sends and receives; and with them: each send stands behind what makes its value and places the
/// receive in the other rank's row, all in the order of one clock, so that even sends that wait for their receive end.
CAPSTAN_API Schedule without_communication(const Schedule& schedule);
CAPSTAN_API Schedule with_communication(const Schedule& schedule);

/// Rank of each stage, by the table's forwards; -1: none.
CAPSTAN_API std::vector<int> rank_of_stage(const Schedule& schedule);

/// Throws Error(input) that names the first action at fault: a stage or microbatch out of range or on two ranks, an action
/// twice or missing, a backward before its forward, weight before input, a value used before it came or sent before it was
/// made, sends and receives that do not match in order, a deadlock. A table without any communication is checked as one.
CAPSTAN_API void validate(const Schedule& schedule);

/// For a person and for files: a head line, then one line a rank. parse() reads it back; Error(input) names line and word.
CAPSTAN_API std::string to_text(const Schedule& schedule);
CAPSTAN_API Schedule parse_schedule(std::string_view text);

}  // namespace capstan::pipeline
