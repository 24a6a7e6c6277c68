// defines: MpiEngine: the one thread that calls MPI: starts it, moves messages, beats, watches and leaves.
#pragma once
#include "comm/segment.h"
#include "comm/transport.h"
#include "comm/watch.h"

#include <mpi.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace capstan::comm {

struct WorldCore;

class MpiEngine final : public Transport {
 public:
  /// Enters MPI in a thread of its own and makes this host's shared memory. `ranks_per_host` > 0 cuts hosts into smaller ones.
  MpiEngine(double timeout, int ranks_per_host);
  /// Waits for all ranks to leave and finalizes MPI; a job that failed just ends the thread.
  ~MpiEngine() override;

  std::shared_ptr<Message> send(int world_rank, std::uint32_t tag, const void* data, std::int64_t bytes) override;
  std::shared_ptr<Message> receive(int world_rank, std::uint32_t tag, void* data, std::int64_t bytes) override;
  void abandon() override;
  const std::vector<int>& host_of() const override { return host_of_; }

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::vector<int>& local() const { return local_; }
  int hosts() const { return hosts_; }
  const std::shared_ptr<void>& memory() const { return memory_; }
  /// From now on this rank's failures are told to other hosts, and who is gone is noticed. `end` ends this process when its main
  /// thread does not see for too long that the job failed.
  void watch(Watch* watch, std::atomic<bool>* printed, std::function<void()> end);
  /// The watch is about to go.
  void unwatch();
  RankState remote(int world_rank) const;
  /// Blocks until the messages about a failure are on their way, for at most `seconds`.
  void flush_failure(double seconds);

 private:
  struct Posted {
    std::shared_ptr<Message> message;
    void* data;
    std::int64_t bytes;
    int peer;
    std::uint32_t tag;
    bool sends;
  };
  struct Control { std::vector<std::byte> data; MPI_Request request; int peer; };
  std::shared_ptr<Message> post(Posted posted);
  void run();
  void enter();
  void leave();
  void start(const Posted& posted);
  bool test();             // true: something completed
  void finish(std::size_t i, const MPI_Status& status);
  void drop_messages();
  void listen();           // to other hosts
  void beat();
  void supervise();
  std::vector<int> reachable() const;
  void send_control(int kind, std::vector<std::byte> data, const std::vector<int>& to);
  bool failed() const { return watch_ && watch_->failed(); }

  double timeout_;
  int ranks_per_host_;
  int rank_ = 0, size_ = 1, hosts_ = 1;
  std::vector<int> host_of_, local_, beat_to_, other_hosts_ranks_;
  std::shared_ptr<void> memory_;
  MPI_Comm data_comm_ = MPI_COMM_NULL, control_comm_ = MPI_COMM_NULL, host_comm_ = MPI_COMM_NULL;
  MPI_Win window_ = MPI_WIN_NULL;

  std::mutex mutex_;
  std::condition_variable wake_, ready_;
  std::deque<Posted> queue_;
  bool entered_ = false, stop_ = false, left_ = false;
  std::exception_ptr error_;
  std::atomic<bool> idle_{false}, abandon_{false}, abandoned_{false};

  // Of the thread.
  std::vector<MPI_Request> requests_;
  std::vector<Posted> active_;
  std::vector<Control> controls_;
  std::mutex watch_mutex_;
  Watch* watch_ = nullptr;
  std::atomic<bool>* printed_ = nullptr;
  std::function<void()> end_;
  std::atomic<bool> tell_{false};
  std::int64_t last_beat_ = 0, failed_at_ = 0, gone_at_ = 0;
  std::thread thread_;
};

}  // namespace capstan::comm
