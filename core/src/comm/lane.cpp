// The thread behind asynchronous collectives.
#include "comm/lane.h"

#include <csignal>
#include <utility>

namespace capstan::comm {

void Task::wait() {
  if (!done()) lane_->wait(*this);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

Lane::~Lane() { close(); }

std::shared_ptr<Task> Lane::push(Collective collective, std::function<void()> run, bool wake) {
  auto task = std::make_shared<Task>(shared_from_this(), collective, std::move(run));
  const std::scoped_lock lock(mutex_);
  queue_.push_back(task);
  if (wake) {
    if (!thread_.joinable()) {
      // Signals are the main thread's.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      thread_ = std::thread([this] { work(); });
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    changed_.notify_all();
  }
  return task;
}

std::shared_ptr<Task> Lane::submit(Collective collective, std::function<void()> run) {
  return push(collective, std::move(run), true);
}
std::shared_ptr<Task> Lane::prepare(Collective collective, std::function<void()> run) {
  return push(collective, std::move(run), false);
}

void Lane::run_one(std::unique_lock<std::mutex>& lock) {
  running_ = true;
  auto task = std::move(queue_.front());
  queue_.pop_front();
  lock.unlock();
  try {
    task->run_();
  } catch (...) {
    task->error_ = std::current_exception();
  }
  task->run_ = nullptr;
  lock.lock();
  running_ = false;
  task->done_.store(true, std::memory_order_release);
  changed_.notify_all();
}

void Lane::wait(Task& task) {
  waiting_(task.collective_, [&] {
    std::unique_lock lock(mutex_);
    while (!task.done())
      if (!running_ && !queue_.empty()) run_one(lock);
      else changed_.wait(lock);
  });
}

void Lane::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !running_ && (stop_ || !queue_.empty()); });
    if (!queue_.empty()) run_one(lock);
    else if (stop_) return;
  }
}

void Lane::close() {
  std::unique_lock lock(mutex_);
  stop_ = true;
  changed_.notify_all();
  while (!queue_.empty() || running_)
    if (!running_) run_one(lock);
    else changed_.wait(lock);
  lock.unlock();
  if (thread_.joinable()) thread_.join();
}

}  // namespace capstan::comm
