// Says what is wrong with a table, and where.
#include "pipeline/schedule.h"
#include "pipeline/simulate.h"

#include <capstan/error.h>

#include <map>
#include <utility>
#include <vector>

namespace capstan::pipeline {

namespace {

/// A value on its way between two stages: what a send and a receive agree about.
struct Parcel {
  bool forward;
  int from, microbatch;  // stage that sends
  auto operator<=>(const Parcel&) const = default;
};

Parcel parcel(const Action& a) {
  switch (a.kind) {
    case ActionKind::send_forward: return {true, a.stage, a.microbatch};
    case ActionKind::receive_forward: return {true, a.stage - 1, a.microbatch};
    case ActionKind::send_backward: return {false, a.stage, a.microbatch};
    default: return {false, a.stage + 1, a.microbatch};
  }
}

class Check {
 public:
  explicit Check(const Schedule& s) : s_(s), place_(rank_of_stage(s)) {
    for (const auto& row : s_.rows)
      for (const Action& a : row) communicates_ |= !a.computes();
  }

  void run() {
    if (static_cast<int>(s_.rows.size()) != s_.ranks)
      wrong("expected a row for each of " + std::to_string(s_.ranks) + " ranks, got " + std::to_string(s_.rows.size()));
    seen_.assign(8 * static_cast<std::size_t>(s_.stages) * static_cast<std::size_t>(s_.microbatches), false);
    for (std::size_t r = 0; r < s_.rows.size(); ++r)
      for (std::size_t i = 0; i < s_.rows[r].size(); ++i) range(r, i);
    for (std::size_t r = 0; r < s_.rows.size(); ++r)
      for (std::size_t i = 0; i < s_.rows[r].size(); ++i) one(r, i);
    for (int stage = 0; stage < s_.stages; ++stage)
      for (int m = 0; m < s_.microbatches; ++m) complete(stage, m);
    if (communicates_) order(), rendezvous();
    else simulate(s_);
  }

 private:
  [[noreturn]] void wrong(const std::string& what) const { fail(Fault::input, "pipeline schedule " + s_.name, what); }
  [[noreturn]] void wrong(std::size_t rank, std::size_t index, const std::string& what) const {
    fail(Fault::input, "pipeline schedule " + s_.name,
         "rank " + std::to_string(rank) + ", action " + std::to_string(index) + ", " + to_string(s_.rows[rank][index]) + ": " + what);
  }
  int rank_of(int stage) const { return place_[static_cast<std::size_t>(stage)]; }
  std::size_t at(ActionKind kind, int stage, int m) const {
    const auto row = static_cast<std::size_t>(kind) * static_cast<std::size_t>(s_.stages) + static_cast<std::size_t>(stage);
    return row * static_cast<std::size_t>(s_.microbatches) + static_cast<std::size_t>(m);
  }
  bool has(ActionKind kind, int stage, int m) const { return seen_[at(kind, stage, m)]; }
  bool apart(int a, int b) const { return rank_of(a) != rank_of(b); }

  void range(std::size_t r, std::size_t i) const {
    const Action& a = s_.rows[r][i];
    if (a.stage < 0 || a.stage >= s_.stages) wrong(r, i, "there is no such stage: there are " + std::to_string(s_.stages));
    if (a.microbatch < 0 || a.microbatch >= s_.microbatches) wrong(r, i, "there is no such microbatch: there are " + std::to_string(s_.microbatches));
    if (rank_of(a.stage) != static_cast<int>(r))
      wrong(r, i, rank_of(a.stage) < 0 ? "no rank runs this stage's forwards" : "this stage is on rank " + std::to_string(rank_of(a.stage)) + ": a stage has one rank");
    if (!s_.backward && a.kind != ActionKind::forward && a.kind != ActionKind::send_forward && a.kind != ActionKind::receive_forward)
      wrong(r, i, "the schedule is forward only");
  }

  void one(std::size_t r, std::size_t i) {
    const Action& a = s_.rows[r][i];
    const int s = a.stage, m = a.microbatch;
    if (has(a.kind, s, m)) wrong(r, i, "it is there twice");
    const bool first = s == 0, last = s + 1 == s_.stages;
    const bool done = has(ActionKind::backward, s, m) || has(ActionKind::input, s, m);
    switch (a.kind) {
      case ActionKind::forward:
        if (first) break;
        if (!apart(s, s - 1) && !has(ActionKind::forward, s - 1, m)) wrong(r, i, "it comes before the forward of the stage that it reads from");
        if (communicates_ && apart(s, s - 1) && !has(ActionKind::receive_forward, s, m)) wrong(r, i, "its input has not been received");
        break;
      case ActionKind::backward:
      case ActionKind::input:
        if (done) wrong(r, i, "the input part of this backward is there already");
        if (!has(ActionKind::forward, s, m)) wrong(r, i, "it comes before its forward");
        if (last) break;
        if (!apart(s, s + 1) && !has(ActionKind::backward, s + 1, m) && !has(ActionKind::input, s + 1, m))
          wrong(r, i, "it comes before the backward of the stage that read from it");
        if (communicates_ && apart(s, s + 1) && !has(ActionKind::receive_backward, s, m)) wrong(r, i, "its gradient has not been received");
        break;
      case ActionKind::weight:
        if (has(ActionKind::backward, s, m)) wrong(r, i, "its backward computed the weight part already");
        if (!has(ActionKind::input, s, m)) wrong(r, i, "it comes before the input part");
        break;
      case ActionKind::send_forward:
        if (last || !apart(s, s + 1)) wrong(r, i, last ? "the last stage has nobody to send to" : "the next stage is on the same rank");
        if (!has(ActionKind::forward, s, m)) wrong(r, i, "it comes before the forward whose result it sends");
        break;
      case ActionKind::receive_forward:
        if (first || !apart(s, s - 1)) wrong(r, i, first ? "the first stage reads the batch alone" : "the stage before is on the same rank");
        break;
      case ActionKind::send_backward:
        if (first || !apart(s, s - 1)) wrong(r, i, first ? "the first stage has nobody to send to" : "the stage before is on the same rank");
        if (!done) wrong(r, i, "it comes before the backward whose result it sends");
        break;
      case ActionKind::receive_backward:
        if (last || !apart(s, s + 1)) wrong(r, i, last ? "the last stage has its gradient from the loss" : "the next stage is on the same rank");
        break;
    }
    seen_[at(a.kind, s, m)] = true;
  }

  void complete(int s, int m) const {
    const auto missing = [&](ActionKind kind) {
      wrong("rank " + std::to_string(rank_of(s)) + " lacks " + to_string(Action{kind, s, m}));
    };
    if (rank_of(s) < 0) wrong("no rank runs stage " + std::to_string(s));
    if (!has(ActionKind::forward, s, m)) missing(ActionKind::forward);
    if (s_.backward && !has(ActionKind::backward, s, m)) {
      if (!has(ActionKind::input, s, m)) missing(ActionKind::backward);
      if (!has(ActionKind::weight, s, m)) missing(ActionKind::weight);
    }
    if (!communicates_) return;
    if (s + 1 < s_.stages && apart(s, s + 1) && !has(ActionKind::send_forward, s, m)) missing(ActionKind::send_forward);
    if (s_.backward && s > 0 && apart(s, s - 1) && !has(ActionKind::send_backward, s, m)) missing(ActionKind::send_backward);
    // Receives are there: forwards and backwards were refused without.
  }

  int peer(const Action& a) const {
    const bool up = a.kind == ActionKind::send_forward || a.kind == ActionKind::receive_backward;
    return rank_of(up ? a.stage + 1 : a.stage - 1);
  }
  static bool sends(const Action& a) { return a.kind == ActionKind::send_forward || a.kind == ActionKind::send_backward; }

  /// Transports match sends and receives of a pair of ranks by their order alone.
  void order() const {
    std::map<std::pair<int, int>, std::vector<std::pair<Parcel, std::size_t>>> sent, received;
    for (std::size_t r = 0; r < s_.rows.size(); ++r)
      for (std::size_t i = 0; i < s_.rows[r].size(); ++i) {
        const Action& a = s_.rows[r][i];
        if (a.computes()) continue;
        const int here = static_cast<int>(r);
        if (sends(a)) sent[{here, peer(a)}].emplace_back(parcel(a), i);
        else received[{peer(a), here}].emplace_back(parcel(a), i);
      }
    for (const auto& [pair, receives] : received) {
      const auto& sends_of = sent[pair];
      const auto to = static_cast<std::size_t>(pair.second), from = static_cast<std::size_t>(pair.first);
      for (std::size_t i = 0; i < receives.size(); ++i) {
        if (i >= sends_of.size()) wrong(to, receives[i].second, "rank " + std::to_string(from) + " does not send it");
        if (receives[i].first != sends_of[i].first)
          wrong(to, receives[i].second, "rank " + std::to_string(from) + " sends " + to_string(s_.rows[from][sends_of[i].second]) + " here in its place");
      }
      if (sends_of.size() > receives.size()) wrong(from, sends_of[receives.size()].second, "rank " + std::to_string(to) + " does not receive it");
    }
  }

  /// Even when a send waits for its receive and each rank does one thing at a time, all rows come to their end.
  void rendezvous() const {
    std::vector<std::size_t> next(s_.rows.size(), 0);
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t r = 0; r < next.size(); ++r) {
        const auto& row = s_.rows[r];
        while (next[r] < row.size()) {
          const Action& a = row[next[r]];
          if (!a.computes()) {
            const auto other = static_cast<std::size_t>(peer(a));
            if (next[other] >= s_.rows[other].size()) break;
            const Action& b = s_.rows[other][next[other]];
            if (b.computes() || sends(a) == sends(b) || parcel(a) != parcel(b)) break;
            ++next[other];
          }
          ++next[r];
          moved = true;
        }
      }
    }
    std::string stuck;
    std::size_t at = next.size();
    for (std::size_t r = 0; r < next.size(); ++r)
      if (next[r] < s_.rows[r].size()) {
        if (at == next.size()) at = r;
        stuck += (stuck.empty() ? "" : ", ") + ("rank " + std::to_string(r) + " at " + to_string(s_.rows[r][next[r]]));
      }
    if (at < next.size()) wrong(at, next[at], "deadlock: " + stuck + " wait for each other");
  }

  const Schedule& s_;
  std::vector<int> place_;
  bool communicates_ = false;
  std::vector<bool> seen_;
};

}  // namespace

void validate(const Schedule& schedule) { Check(schedule).run(); }

}  // namespace capstan::pipeline
