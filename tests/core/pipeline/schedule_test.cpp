// Pipeline tables: every schedule over ranks, stages and microbatches is valid, costs what its formula says, and reads back
// from its text; the validator names each kind of fault.
#include "pipeline/schedule.h"
#include "pipeline/simulate.h"

#include <capstan/error.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace capstan::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::input) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no Error";
  return "";
}

struct Case { Plan plan; int microbatches; };

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const ScheduleKind kind : {ScheduleKind::gpipe, ScheduleKind::one_f_one_b, ScheduleKind::interleaved, ScheduleKind::zero_bubble})
    for (int ranks = 1; ranks <= 8; ++ranks)
      for (int per_rank = 1; per_rank <= 4; ++per_rank) {
        if ((kind == ScheduleKind::one_f_one_b && per_rank > 1) || (kind == ScheduleKind::interleaved && per_rank == 1)) continue;
        for (int m = 1; m <= 32; ++m) cases.push_back({{kind, ranks, per_rank}, m});
      }
  return cases;
}

std::string name(const Case& c) {
  return std::string(name_of(c.plan.kind)) + " ranks " + std::to_string(c.plan.ranks) + " stages a rank " + std::to_string(c.plan.stages_per_rank) +
         " microbatches " + std::to_string(c.microbatches);
}

TEST(Schedules, AreValidWithAnyNumberOfMicrobatches) {
  int seen = 0;
  for (const Case& c : all_cases()) {
    const Schedule s = make_schedule(c.plan, c.microbatches);
    ASSERT_NO_THROW(validate(s)) << name(c);
    ASSERT_NO_THROW(validate(without_communication(s))) << name(c);
    ASSERT_EQ(parse_schedule(to_text(s)), s) << name(c);
    const Schedule forward = make_forward_schedule(c.plan, c.microbatches);
    ASSERT_NO_THROW(validate(forward)) << name(c);
    ASSERT_EQ(parse_schedule(to_text(forward)), forward) << name(c);
    ++seen;
  }
  EXPECT_EQ(seen, 3072);
}

/// Counted from the table itself, not by the generator's or the validator's bookkeeping.
TEST(Schedules, EachMicrobatchPassesEachStageOnceBothWays) {
  for (const Case& c : all_cases()) {
    if (c.microbatches > 9) continue;
    const Schedule s = make_schedule(c.plan, c.microbatches);
    for (int stage = 0; stage < s.stages; ++stage)
      for (int m = 0; m < s.microbatches; ++m) {
        const auto& row = s.rows[static_cast<std::size_t>(stage % s.ranks)];
        const auto count = [&](ActionKind kind) { return std::count(row.begin(), row.end(), Action{kind, stage, m}); };
        ASSERT_EQ(count(ActionKind::forward), 1) << name(c);
        ASSERT_EQ(count(ActionKind::backward) + count(ActionKind::input), 1) << name(c);
        ASSERT_EQ(count(ActionKind::backward) + count(ActionKind::weight), 1) << name(c);
        const bool moves = s.ranks > 1;
        ASSERT_EQ(count(ActionKind::send_forward), moves && stage + 1 < s.stages) << name(c);
        ASSERT_EQ(count(ActionKind::receive_forward), moves && stage > 0) << name(c);
        ASSERT_EQ(count(ActionKind::send_backward), moves && stage > 0) << name(c);
        ASSERT_EQ(count(ActionKind::receive_backward), moves && stage + 1 < s.stages) << name(c);
      }
  }
}

/// Gradients of a stage add up in the order of the microbatches, as in a run without a pipeline.
TEST(Schedules, WeightGradientsComeInTheOrderOfMicrobatches) {
  for (const Case& c : all_cases()) {
    const Schedule s = make_schedule(c.plan, c.microbatches);
    std::vector<int> last(static_cast<std::size_t>(s.stages), -1), last_forward = last;
    for (const auto& row : s.rows)
      for (const Action& a : row) {
        const auto stage = static_cast<std::size_t>(a.stage);
        if (a.kind == ActionKind::forward) {
          ASSERT_EQ(a.microbatch, ++last_forward[stage]) << name(c);
        }
        if (a.kind == ActionKind::backward || a.kind == ActionKind::weight) {
          ASSERT_EQ(a.microbatch, ++last[stage]) << name(c);
        }
      }
  }
}

TEST(Schedules, BubblesAreThoseOfTheFormulas) {
  for (const Case& c : all_cases()) {
    if (c.plan.ranks == 1) continue;
    const Simulation s = simulate(make_schedule(c.plan, c.microbatches));
    const double p = c.plan.ranks, v = c.plan.stages_per_rank, m = c.microbatches;
    const bool grouped = c.plan.kind == ScheduleKind::interleaved || c.plan.kind == ScheduleKind::zero_bubble;
    if (grouped && c.microbatches % c.plan.ranks != 0) continue;  // the last group is longer: no formula
    if (c.plan.kind == ScheduleKind::zero_bubble) {
      // (p - 1)(F + I - W) idle on each rank, once the pipeline is full
      EXPECT_NEAR(s.makespan, 3 * v * m + p - 1, 1e-9) << name(c);
    } else if (c.plan.kind == ScheduleKind::interleaved) {
      EXPECT_NEAR(s.bubble, (p - 1) / (v * m + p - 1), 1e-12) << name(c);
    } else if (v == 1) {
      EXPECT_NEAR(s.bubble, (p - 1) / (m + p - 1), 1e-12) << name(c);
    }
  }
}

TEST(Schedules, ZeroBubbleIsFasterWithinTheMemoryOfRankZero) {
  for (int ranks = 2; ranks <= 8; ++ranks)
    for (int per_rank = 1; per_rank <= 4; ++per_rank)
      for (int m = ranks; m <= 32; ++m) {
        const Simulation zero = simulate(make_schedule({ScheduleKind::zero_bubble, ranks, per_rank}, m));
        const Simulation other =
            simulate(make_schedule({per_rank == 1 ? ScheduleKind::one_f_one_b : ScheduleKind::interleaved, ranks, per_rank}, m));
        EXPECT_LT(zero.makespan, other.makespan) << ranks << " " << per_rank << " " << m;
        EXPECT_LE(*std::max_element(zero.live.begin(), zero.live.end()), other.live[0]) << ranks << " " << per_rank << " " << m;
      }
}

TEST(Schedules, LiveMicrobatchesAreThoseOfTheFormulas) {
  EXPECT_THAT(simulate(make_schedule({ScheduleKind::gpipe, 4, 1}, 8)).live, ElementsAre(8, 8, 8, 8));
  EXPECT_THAT(simulate(make_schedule({ScheduleKind::one_f_one_b, 4, 1}, 8)).live, ElementsAre(4, 3, 2, 1));
  EXPECT_THAT(simulate(make_schedule({ScheduleKind::one_f_one_b, 4, 1}, 2)).live, ElementsAre(2, 2, 2, 1));
  // 2 (p - r - 1) + (v - 1) p + 1 (Narayanan et al. 2021)
  EXPECT_THAT(simulate(make_schedule({ScheduleKind::interleaved, 4, 2}, 8)).live, ElementsAre(11, 9, 7, 5));
  EXPECT_THAT(simulate(make_schedule({ScheduleKind::zero_bubble, 4, 1}, 8)).live, ElementsAre(4, 4, 4, 4));
}

TEST(Schedules, KnownTables) {
  EXPECT_EQ(to_text(make_schedule({ScheduleKind::one_f_one_b, 2, 1}, 3)),
            "1f1b: 2 ranks, 2 stages, 3 microbatches\n"
            "rank 0: 0F0 0SF0 0F1 0SF1 0RB0 0B0 0F2 0SF2 0RB1 0B1 0RB2 0B2\n"
            "rank 1: 1RF0 1RF1 1F0 1B0 1SB0 1F1 1RF2 1B1 1SB1 1F2 1B2 1SB2\n");
  EXPECT_EQ(to_text(without_communication(make_schedule({ScheduleKind::zero_bubble, 3, 1}, 3))),
            "zero_bubble: 3 ranks, 3 stages, 3 microbatches\n"
            "rank 0: 0F0 0F1 0F2 0B0 0B1 0B2\n"
            "rank 1: 1F0 1F1 1I0 1F2 1I1 1W0 1I2 1W1 1W2\n"
            "rank 2: 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2W1 2W2\n");
}

TEST(Schedules, UnequalStagesAndLatencyCost) {
  const Schedule s = make_schedule({ScheduleKind::one_f_one_b, 2, 1}, 2);
  // Stage 1 is the long one: 1 (first forward of stage 0), 2 x (2 + 4) of stage 1, the last backward of stage 0.
  EXPECT_DOUBLE_EQ(simulate(s, {{1, 2}, {1, 2}, {1, 2}, 0}).makespan, 1 + 12 + 2);
  EXPECT_DOUBLE_EQ(simulate(s, {{1, 2}, {1, 2}, {1, 2}, 0.5}).makespan, 1 + 12 + 2 + 1);
  EXPECT_NEAR(simulate(s, {{1, 2}, {1, 2}, {1, 2}, 0}).bubble, 1 - 18.0 / 30, 1e-12);
}

TEST(Schedules, SayWhatTheyCost) {
  EXPECT_EQ(describe(simulate(make_schedule({ScheduleKind::one_f_one_b, 4, 1}, 8))),
            "1f1b over 4 ranks, 8 microbatches: 27.3% bubble, live microbatches 4 3 2 1");
  EXPECT_EQ(describe(simulate(make_schedule({ScheduleKind::interleaved, 4, 2}, 8))),
            "interleaved over 4 ranks of 2 stages, 8 microbatches: 15.8% bubble, live microbatches (each stage's) 11 9 7 5");
  EXPECT_THAT(describe(simulate(make_schedule({ScheduleKind::one_f_one_b, 32, 1}, 64))), HasSubstr("live microbatches 1 to 32"));
}

TEST(Schedules, PlansThatMakeNoSenseAreRefused) {
  EXPECT_THAT(error_of([] { schedule_kind("1f2b"); }), AllOf(HasSubstr("'1f2b'"), HasSubstr("zero_bubble"), HasSubstr("did you mean 1f1b?")));
  EXPECT_EQ(schedule_kind("zero_bubble"), ScheduleKind::zero_bubble);
  EXPECT_THAT(error_of([] { make_schedule({ScheduleKind::one_f_one_b, 4, 2}, 8); }), AllOf(HasSubstr("1f1b"), HasSubstr("got 2"), HasSubstr("interleaved")));
  EXPECT_THAT(error_of([] { make_schedule({ScheduleKind::interleaved, 4, 1}, 8); }), AllOf(HasSubstr("stages_per_rank"), HasSubstr("1f1b")));
  EXPECT_THAT(error_of([] { make_schedule({ScheduleKind::gpipe, 4, 1}, 0); }), HasSubstr("at least 1 microbatch, got 0"));
  EXPECT_THAT(error_of([] { make_schedule({ScheduleKind::gpipe, 0, 1}, 4); }), HasSubstr("at least 1 rank, got 0"));
}

// ---- faults, each planted in a good table ----

/// A table of two ranks as text, one piece of it replaced.
Schedule broken(const std::string& from, const std::string& to) {
  std::string text = to_text(make_schedule({ScheduleKind::one_f_one_b, 2, 1}, 3));
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  return parse_schedule(text);
}

std::string found(const std::string& from, const std::string& to) {
  return error_of([&] { validate(broken(from, to)); });
}

TEST(Faults, OfComputeActionsAreNamed) {
  EXPECT_THAT(found("0F1 ", "0F7 "), AllOf(HasSubstr("rank 0, action 2, 0F7"), HasSubstr("no such microbatch: there are 3")));
  EXPECT_THAT(found("0F1 ", "5F1 "), AllOf(HasSubstr("rank 0, action 2, 5F1"), HasSubstr("no such stage: there are 2")));
  EXPECT_THAT(found("0F1 ", "0F0 "), AllOf(HasSubstr("rank 0, action 2, 0F0"), HasSubstr("twice")));
  EXPECT_THAT(found("1F1 ", "0F1 "), AllOf(HasSubstr("rank 1, action 5, 0F1"), HasSubstr("on rank 0")));
  EXPECT_THAT(found("0F2 0SF2 0RB1 0B1 0RB2 0B2", "0F2 0SF2 0RB1 0B1 0RB2"), HasSubstr("rank 0 lacks 0B2"));
  EXPECT_THAT(found("0F0 0SF0 0F1 0SF1 0RB0 0B0", "0RB0 0B0 0F0 0SF0 0F1 0SF1"), AllOf(HasSubstr("rank 0, action 1, 0B0"), HasSubstr("before its forward")));
  EXPECT_THAT(found("1B0 ", "1W0 1I0 "), AllOf(HasSubstr("1W0"), HasSubstr("before the input part")));
  EXPECT_THAT(found("1B0 ", "1I0 "), HasSubstr("rank 1 lacks 1W0"));
  EXPECT_THAT(found("1B0 ", "1B0 1W0 "), AllOf(HasSubstr("1W0"), HasSubstr("already")));
  EXPECT_THAT(found("1B0 ", "1B0 1I0 "), AllOf(HasSubstr("1I0"), HasSubstr("already")));
  EXPECT_THAT(found("3 microbatches", "4 microbatches"), HasSubstr("rank 0 lacks 0F3"));
  EXPECT_THAT(found("3 microbatches", "3 microbatches, forward only"), AllOf(HasSubstr("0RB0"), HasSubstr("forward only")));
}

TEST(Faults, OfCommunicationAreNamed) {
  EXPECT_THAT(found("1RF1 ", ""), AllOf(HasSubstr("1F1"), HasSubstr("not been received")));
  EXPECT_THAT(found("0RB1 ", ""), AllOf(HasSubstr("0B1"), HasSubstr("not been received")));
  EXPECT_THAT(found("0SF1 ", ""), HasSubstr("rank 0 lacks 0SF1"));
  EXPECT_THAT(found("1SB0 ", ""), HasSubstr("rank 1 lacks 1SB0"));
  EXPECT_THAT(found("0F1 0SF1 ", "0SF1 0F1 "), AllOf(HasSubstr("0SF1"), HasSubstr("before the forward")));
  EXPECT_THAT(found("1B0 1SB0 ", "1SB0 1B0 "), AllOf(HasSubstr("1SB0"), HasSubstr("before the backward")));
  EXPECT_THAT(found("1B2 1SB2", "1B2 1SB2 1SF2"), AllOf(HasSubstr("1SF2"), HasSubstr("nobody to send to")));
  EXPECT_THAT(found("0F0 ", "0RF0 0F0 "), AllOf(HasSubstr("0RF0"), HasSubstr("batch alone")));
  EXPECT_THAT(found("1F2 ", "1RB2 1F2 "), AllOf(HasSubstr("1RB2"), HasSubstr("loss")));
  // Both are there, in an order that a transport would get wrong without a word.
  EXPECT_THAT(found("1RF0 1RF1 1F0", "1RF1 1RF0 1F0"), AllOf(HasSubstr("rank 1, action 0, 1RF1"), HasSubstr("sends 0SF0 here in its place")));
}

TEST(Faults, DeadlocksAreNamed) {
  // Each rank waits for the other's value before it sends its own.
  EXPECT_THAT(found("0F1 0SF1 0RB0 0B0 0F2 0SF2", "0RB0 0B0 0F1 0SF1 0F2 0SF2"), AllOf(HasSubstr("deadlock"), HasSubstr("rank 0 at 0RB0"), HasSubstr("rank 1 at 1RF1")));
  const Schedule bare = parse_schedule("x: 2 ranks, 2 stages, 2 microbatches\nrank 0: 0F0 0B0 0F1 0B1\nrank 1: 1F0 1F1 1B0 1B1\n");
  EXPECT_THAT(error_of([&] { validate(bare); }), AllOf(HasSubstr("deadlock"), HasSubstr("0B0")));
}

TEST(Faults, OfTextAreNamedByLine) {
  EXPECT_THAT(error_of([] { parse_schedule("1f1b 2 ranks"); }), AllOf(HasSubstr("line 1"), HasSubstr("'1f1b 2 ranks'")));
  EXPECT_THAT(error_of([] { parse_schedule("x: 1 ranks, 1 stages, 1 microbatches\nrank 0: 0F0 0Q0\n"); }), AllOf(HasSubstr("line 2"), HasSubstr("'0Q0'")));
  EXPECT_THAT(error_of([] { parse_schedule("x: 1 ranks, 1 stages, 1 microbatches\nrank 0: 0F\n"); }), HasSubstr("'0F'"));
  EXPECT_THAT(error_of([] { parse_schedule("x: 2 ranks, 2 stages, 1 microbatches\nrank 1: 0F0\n"); }), AllOf(HasSubstr("line 2"), HasSubstr("rank 0")));
  EXPECT_THAT(error_of([] { parse_schedule("x: 2 ranks, 2 stages, 1 microbatches\nrank 0: 0F0\n"); }), HasSubstr("each of 2 ranks, got 1"));
  EXPECT_THAT(error_of([] { parse_schedule("x: 99999999999 ranks, 2 stages, 1 microbatches\n"); }), HasSubstr("line 1"));
}

/// A person's own table runs as well: stages in a V, the first and the last on rank 0.
TEST(Faults, OtherPlacementsAreNone) {
  const Schedule v = with_communication(parse_schedule(
      "v: 2 ranks, 4 stages, 2 microbatches\nrank 0: 0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1\nrank 1: 1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1\n"));
  EXPECT_NO_THROW(validate(v));
  EXPECT_THAT(rank_of_stage(v), ElementsAre(0, 1, 1, 0));
  EXPECT_EQ(to_text(v).find("1SF"), std::string::npos);  // stage 2 is on the same rank
}

}  // namespace
}  // namespace capstan::pipeline
