// Who is missing, and why: from the status pages of this host's ranks and from /proc.
#include "comm/watch.h"

#include <fmt/format.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <set>
#include <thread>

namespace capstan::comm {
namespace {

// How long a sleeper stays before it looks whether those it waits for still live.
constexpr long kSliceNs = 20'000'000;
// Other hosts tell of their ranks four times a second; this many seconds without a word is worth a word.
constexpr double kSilent = 1.2;

char process_state(int pid) {  // R, S, D, T, t, Z, or 0: there is none
  std::FILE* file = std::fopen(fmt::format("/proc/{}/stat", pid).c_str(), "r");
  if (!file) return 0;
  char line[512] = {};
  const std::size_t n = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  line[n] = 0;
  const char* end = std::strrchr(line, ')');  // the name before it may hold anything
  return end && end[1] == ' ' ? end[2] : 'R';
}

std::string quoted_step(const RankState& s) {
  std::string text = s.step >= 0 ? fmt::format("step {}", s.step) : std::string("before the first step");
  if (!s.doing.empty()) text += ", " + s.doing;
  return text;
}

}  // namespace

std::int64_t monotonic_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

Watch::Watch(Segment segment, int local_rank, std::vector<int> world_of_local, double timeout)
    : segment_(std::move(segment)), local_rank_(local_rank), world_of_local_(std::move(world_of_local)), timeout_(timeout) {
  // Spinning pays only while every rank has a core of its own, and then only for a moment: compute wants the core.
  const bool roomy = world_of_local_.size() <= std::max(1u, std::thread::hardware_concurrency());
  spins_ = roomy ? 300 : 20;
  yields_ = roomy ? 20 : 4;
}

void Watch::yield() { sched_yield(); }

void Watch::futex_wait(Word& word, std::uint32_t seen) {
  const timespec slice{0, kSliceNs};
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, seen, &slice, nullptr, 0);
}

void Watch::post(Word& word, Word& waiters, std::uint32_t value) {
  word.store(value);
  if (waiters.load() != 0)
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

int Watch::local_of(int world_rank) const {
  const auto at = std::find(world_of_local_.begin(), world_of_local_.end(), world_rank);
  return at == world_of_local_.end() ? -1 : static_cast<int>(at - world_of_local_.begin());
}

std::string Watch::describe(const Site& site) const {
  if (!site.slot) return "the start of the job";
  return fmt::format("{} {} of communicator '{}'", name_of(site.collective), site.sequence, site.slot->name);
}

RankState Watch::state(int world_rank) const {
  const int local = local_of(world_rank);
  if (local < 0) return remote_ ? remote_(world_rank) : RankState{};
  const StatusPage& page = segment_.page(local);
  RankState s;
  s.phase = page.phase.load(std::memory_order_acquire);
  s.known = s.phase != Phase::absent;
  s.pid = page.pid;
  s.step = page.step;
  s.doing = page.doing.get();
  s.blocked = page.blocked > 0;
  if (const std::int64_t beat = page.heartbeat; beat > 0) s.silent = 1e-9 * static_cast<double>(monotonic_ns() - beat);
  if (s.pid > 0 && s.pid != getpid()) {
    const char state = process_state(s.pid);
    s.gone = state == 0 || state == 'Z' || state == 'X';
    s.stopped = state == 'T' || state == 't';
  }
  return s;
}

std::string Watch::say(int world_rank, const RankState& s) const {
  std::string why;
  if (!s.known) why = "it has not started, or nothing is known of it";
  else if (s.gone) why = fmt::format("its process {} is gone (killed or crashed)", s.pid);
  else if (s.stopped) why = fmt::format("its process {} is stopped (SIGSTOP or a debugger)", s.pid);
  else if (s.phase == Phase::left) why = "it has left the job";
  else if (s.silent > kSilent && local_of(world_rank) < 0)
    why = fmt::format("its host was not heard from for {:.1f} s: the host or the link to it is down", s.silent);
  else if (s.silent > kSilent) why = fmt::format("nothing was heard from it for {:.1f} s", s.silent);
  else why = s.blocked ? "it waits for others itself" : "it is running but did not come";
  return fmt::format("rank {} ({}): {}", world_rank, quoted_step(s), why);
}

bool Watch::set_failure(std::string_view where, std::string_view text, bool names_collective, bool found_here) {
  FailureRecord& record = segment_.header().failure;
  std::uint32_t none = 0;
  if (!record.state.compare_exchange_strong(none, 1)) return false;
  const auto copy = [](char* to, std::size_t size, std::string_view from) {
    if (from.size() >= size) from = from.substr(0, size - 1);
    std::memcpy(to, from.data(), from.size());
    to[from.size()] = 0;
  };
  copy(record.where, sizeof record.where, where);
  copy(record.text, sizeof record.text, text);
  record.names_collective = names_collective;
  record.finder = found_here ? world_rank() : -1;
  record.state.store(2, std::memory_order_release);
  if (found_here && tell_) tell_();
  return true;
}

std::string Watch::failure_text() const { return failed() ? segment_.header().failure.text : ""; }

void Watch::throw_if_failed(const Site& site) const {
  if (!failed()) return;
  const FailureRecord& record = segment_.header().failure;
  std::string text = record.text;
  if (!record.names_collective) text += "; it was expected in " + describe(site);
  fail(Fault::runtime, record.where, text);
}

RankState Watch::lost(int missing) const {
  if (missing < 0 || missing == world_rank() || local_of(missing) < 0) return {};
  RankState s = state(missing);
  return s.gone || s.phase == Phase::left ? s : RankState{};
}

void Watch::lose(int missing, const RankState& s, const Site& site) {
  // It may have said why before it went, or another rank is saying it now.
  set_failure(fmt::format("rank {}", missing),
              fmt::format("{}; it was expected in {} by rank {}", say(missing, s), describe(site), world_rank()), true);
  await_failure();
  throw_if_failed(site);
}

void Watch::await_failure(double seconds) const {
  for (int i = 0; i < static_cast<int>(1000 * seconds) && !failed(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

bool Watch::report_if_gone(int missing) {
  const RankState s = lost(missing);
  if (!s.gone || s.phase != Phase::running) return false;
  set_failure(fmt::format("rank {}", missing), say(missing, s), false);
  await_failure();
  return true;
}

// Follows who waits for whom until ranks that wait for nobody: they hold up the others.
void Watch::give_up(int missing, const Site& site) {
  throw_if_failed(site);
  struct Edge { int rank; std::string in; };
  std::vector<Edge> open{{missing, describe(site)}}, leaves, seen;
  std::set<int> visited;
  while (!open.empty()) {
    Edge edge = std::move(open.back());
    open.pop_back();
    if (!visited.insert(edge.rank).second) continue;
    seen.push_back(edge);
    const RankState s = state(edge.rank);
    const int local = local_of(edge.rank);
    bool waits = false;
    if (local >= 0 && s.known && s.blocked && !s.gone && !s.stopped) {
      for (const WaitEntry& entry : segment_.page(local).waits) {
        if (entry.state.load(std::memory_order_acquire) != 2) continue;
        const Site its{segment_.at<Slot>(entry.slot), static_cast<Collective>(entry.collective.load()), entry.sequence};
        if (entry.missing < 0) continue;
        waits = true;
        open.push_back({entry.missing, describe(its)});
      }
    }
    if (!waits) leaves.push_back(edge);
  }
  // Another host that is heard from knows better what its ranks do and whom they wait for: it is about to say so.
  const auto waits_elsewhere = [&](const Edge& e) {
    if (local_of(e.rank) >= 0) return false;
    const RankState s = state(e.rank);
    return s.known && s.silent < kSilent;
  };
  if (std::any_of(leaves.begin(), leaves.end(), waits_elsewhere)) {
    await_failure(std::min(1.0, timeout_ / 2));
    throw_if_failed(site);
    std::vector<Edge> worse;
    for (int r = 0; remote_ && r < world_size_; ++r)
      if (const RankState s = state(r); local_of(r) < 0 && (s.gone || s.stopped)) worse.push_back({r, leaves.front().in});
    if (!worse.empty()) leaves = worse;
  }
  // Who waits for all to start knows better which rank has not: it is about to say so.
  bool unstarted = false;
  for (int local = 0; local < static_cast<int>(world_of_local_.size()); ++local) unstarted |= segment_.page(local).phase == Phase::absent;
  if (unstarted) {
    await_failure(std::min(1.0, timeout_ / 2));
    throw_if_failed(site);
  }
  const bool circle = leaves.empty();
  if (circle) leaves = seen;
  std::sort(leaves.begin(), leaves.end(), [](const Edge& a, const Edge& b) { return a.rank < b.rank; });
  std::string text, where;
  for (const Edge& leaf : leaves) {
    where += where.empty() ? fmt::format("rank {}", leaf.rank) : fmt::format(", {}", leaf.rank);
    text += fmt::format("{}{}, expected in {}", text.empty() ? "" : "; ", say(leaf.rank, state(leaf.rank)), leaf.in);
  }
  text += fmt::format("; rank {} waited {:.3g} s in {}", world_rank(), timeout_, describe(site));
  if (circle)
    text += ": these ranks wait for each other; all ranks must call the collectives of a communicator in the same order";
  set_failure(where.substr(0, 60), text, true);
  await_failure();
  throw_if_failed(site);
  fail(Fault::runtime, where, text);
}

Watch::Shown::Shown(const Watch& watch, int missing, const Site& site) {
  if (!site.slot) return;
  for (WaitEntry& entry : watch.own().waits) {
    std::uint32_t none = 0;
    if (!entry.state.compare_exchange_strong(none, 1)) continue;
    entry.slot = watch.segment().offset(site.slot);
    entry.collective = static_cast<std::uint8_t>(site.collective);
    entry.sequence = site.sequence;
    entry.missing = missing;
    entry.state.store(2, std::memory_order_release);
    entry_ = &entry;
    return;
  }
}

Watch::Shown::~Shown() {
  if (entry_) entry_->state.store(0, std::memory_order_release);
}

}  // namespace capstan::comm
