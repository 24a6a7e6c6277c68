// defines: Watch, Site: waiting for other ranks of this host, and saying who did not come.
#pragma once
#include "comm/segment.h"

#include <capstan/error.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::comm {

/// What is being waited in.
struct Site {
  const Slot* slot = nullptr;
  Collective collective = Collective::none;
  std::uint64_t sequence = 0;
};

/// "12, backward of block 3" as one rank says it of itself.
struct RankState {
  bool known = false;        ///< somebody told
  Phase phase = Phase::absent;
  bool gone = false;         ///< its process does not exist
  bool stopped = false;      ///< its process is stopped
  bool blocked = false;      ///< it waits for others itself
  int pid = 0;
  std::int64_t step = -1;
  double silent = -1;        ///< seconds since its heartbeat; -1: nothing beats
  std::string doing;
};

/// One rank's view of who is there. Used by all its threads.
class Watch {
 public:
  Watch(Segment segment, int local_rank, std::vector<int> world_of_local, double timeout);

  /// Blocks until `ready(word)` holds. Error(runtime) when the rank `missing` (of the world) fails, dies or stays away, or
  /// when the job failed in any other way. Sleeps after a short while: ranks may outnumber cores.
  template <class Ready>
  void wait(Word& word, Word& waiters, int missing, const Site& site, Ready&& ready) {
    for (int i = 0; i < spins_; ++i) {
      if (ready(word.load(std::memory_order_acquire))) return;
      __builtin_ia32_pause();
    }
    sleep(word, waiters, missing, site, std::forward<Ready>(ready));
  }
  /// Sets `word` and wakes those who wait for it.
  static void post(Word& word, Word& waiters, std::uint32_t value);

  /// Throws the job's failure, if there is one.
  void throw_if_failed(const Site& site) const;
  bool failed() const { return segment_.header().failure.state.load(std::memory_order_acquire) == 2; }
  /// Records the job's failure unless there is one already. True: this call made it. `where`: "rank 2".
  bool set_failure(std::string_view where, std::string_view text, bool names_collective, bool found_here = true);
  std::string failure_text() const;
  std::string failure_where() const { return segment_.header().failure.where; }
  int failure_finder() const { return segment_.header().failure.finder.load(); }
  /// Told of every failure found on this host, to tell other hosts.
  void on_failure(std::function<void()> tell) { tell_ = std::move(tell); }

  /// `missing` (world rank) did not come within the timeout: finds who holds it up, records the failure and throws it.
  [[noreturn]] void give_up(int missing, const Site& site);
  RankState state(int world_rank) const;
  /// States of ranks on other hosts, as their hosts tell them; and what to say when one does not answer.
  using Remote = std::function<RankState(int world_rank)>;
  void set_remote(Remote remote, int world_size) { remote_ = std::move(remote), world_size_ = world_size; }
  /// Records that a local rank's process is gone, when it is. For who watches without waiting.
  bool report_if_gone(int missing);

  const Segment& segment() const { return segment_; }
  StatusPage& own() const { return segment_.page(local_rank_); }
  int local_rank() const { return local_rank_; }
  int world_rank() const { return world_of_local_[static_cast<std::size_t>(local_rank_)]; }
  const std::vector<int>& world_of_local() const { return world_of_local_; }
  double timeout() const { return timeout_; }
  std::string describe(const Site& site) const;

  /// A wait that lasts, shown on the status page while it does.
  class Shown {
   public:
    Shown(const Watch& watch, int missing, const Site& site);
    ~Shown();
    Shown(const Shown&) = delete;
    Shown& operator=(const Shown&) = delete;

   private:
    WaitEntry* entry_ = nullptr;
  };
  /// Its state when `missing` is dead or has left, else an unknown one.
  RankState lost(int missing) const;
  /// Records and throws that `missing` will never come.
  void lose(int missing, const RankState& state, const Site& site);

 private:
  template <class Ready>
  void sleep(Word& word, Word& waiters, int missing, const Site& site, Ready&& ready) {
    for (int i = 0; i < yields_; ++i) {
      if (ready(word.load(std::memory_order_acquire))) return;
      yield();
    }
    const Shown shown(*this, missing, site);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_);
    while (true) {
      waiters.fetch_add(1);
      const std::uint32_t seen = word.load();
      const bool here = ready(seen);
      if (!here) futex_wait(word, seen);
      waiters.fetch_sub(1);
      if (here || ready(word.load(std::memory_order_acquire))) return;
      throw_if_failed(site);
      // A rank may finish its part and leave between the two looks.
      if (const RankState s = lost(missing); s.known) {
        if (ready(word.load(std::memory_order_acquire))) return;
        lose(missing, s, site);
      }
      if (std::chrono::steady_clock::now() > deadline) give_up(missing, site);
    }
  }
  void await_failure(double seconds = 0.2) const;  // another rank may be writing it
  static void yield();
  static void futex_wait(Word& word, std::uint32_t seen);  // returns after a moment at the latest
  int local_of(int world_rank) const;
  std::string say(int world_rank, const RankState& state) const;

  Segment segment_;
  int local_rank_;
  std::vector<int> world_of_local_;
  double timeout_;
  int spins_, yields_;
  std::function<void()> tell_;
  Remote remote_;
  int world_size_ = 0;
};

std::int64_t monotonic_ns();

}  // namespace capstan::comm
