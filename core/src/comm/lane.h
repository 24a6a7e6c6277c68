// defines: Lane, Task: operations that run one after the other, behind the caller's back.
#pragma once
#include "comm/communicator.h"
#include "comm/segment.h"

#include <capstan/export.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace capstan::comm {

class Lane;

/// One collective of one communicator.
class CAPSTAN_API Task final : public Handle::Operation, public std::enable_shared_from_this<Task> {
 public:
  Task(std::shared_ptr<Lane> lane, Collective collective, std::function<void()> run)
      : lane_(std::move(lane)), collective_(collective), run_(std::move(run)) {}
  void wait() override;
  bool done() override { return done_.load(std::memory_order_acquire); }

 private:
  friend class Lane;
  std::shared_ptr<Lane> lane_;
  Collective collective_;
  std::function<void()> run_;
  std::exception_ptr error_;
  std::atomic<bool> done_{false};
};

/// Runs tasks in the order of their submission: by its own thread, or by a thread that waits for one and finds nobody at
/// work. MPI and shared memory move nothing by themselves; this thread is what moves it while the caller computes.
class CAPSTAN_API Lane : public std::enable_shared_from_this<Lane> {
 public:
  /// Stands around every wait of a caller; `body` blocks.
  using Waiting = std::function<void(Collective collective, const std::function<void()>& body)>;
  explicit Lane(Waiting waiting) : waiting_(std::move(waiting)) {}
  ~Lane();
  std::shared_ptr<Task> submit(Collective collective, std::function<void()> run);
  /// Submits without waking the lane's thread: for who waits at once, and so runs it where nobody else is at it.
  std::shared_ptr<Task> prepare(Collective collective, std::function<void()> run);
  void wait(Task& task);
  /// Runs what is queued and ends the thread. No submit after it.
  void close();

 private:
  std::shared_ptr<Task> push(Collective collective, std::function<void()> run, bool wake);
  void run_one(std::unique_lock<std::mutex>& lock);
  void work();
  Waiting waiting_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Task>> queue_;
  bool running_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace capstan::comm
