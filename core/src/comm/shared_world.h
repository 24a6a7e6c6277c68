// defines: SharedWorld, WorldCore: a job whose ranks share memory on each host.
#pragma once
#include "comm/communicator.h"
#include "comm/segment.h"
#include "comm/transport.h"
#include "comm/watch.h"

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::comm {

/// What the communicators of one rank keep of its world.
struct WorldCore {
  /// `local` are the world ranks of this host, `rank` among them.
  WorldCore(Segment segment, int rank, int size, std::vector<int> local, double timeout);
  ~WorldCore();
  int rank, size;
  std::vector<int> local;
  Watch watch;
  std::atomic<bool> printed{false};        ///< the failure, by this rank
  std::shared_ptr<Transport> transport;    ///< of MPI; null for threads
  bool several_hosts = false;
  /// Refuses a message tag that another communicator of this rank has.
  void claim_tag(std::uint32_t tag, const std::string& name, const std::vector<int>& ranks);

 private:
  std::mutex mutex_;
  std::map<std::uint32_t, std::pair<std::string, std::vector<int>>> tags_;
};

class SharedWorld : public World {
 public:
  SharedWorld(std::shared_ptr<WorldCore> core, std::string backend) : core_(std::move(core)), backend_(std::move(backend)) {}
  int rank() const override { return core_->rank; }
  int size() const override { return core_->size; }
  int local_rank() const override { return core_->watch.local_rank(); }
  int local_size() const override { return static_cast<int>(core_->local.size()); }
  std::string_view backend() const override { return backend_; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override;
  std::shared_ptr<void> shared_memory(std::size_t bytes) override;
  void at(std::int64_t step, std::string_view doing) override;
  bool fail_job(const std::string& message) noexcept override;
  [[noreturn]] void end_failed(int exit_code) override;
  double timeout() const override { return core_->watch.timeout(); }
  const Watch& watch() const { return core_->watch; }

 protected:
  /// "; it was expected in ... by rank 0", from the ranks of this host that wait for this one, or are about to.
  std::string awaited_in() const;

  std::shared_ptr<WorldCore> core_;
  std::string backend_;
};

/// A communicator of one rank: copies, and nothing to wait for.
std::shared_ptr<Communicator> make_solo(std::string name, std::vector<int> ranks);
/// Checks what World::make() was given; the place of `rank` in `ranks`. Error(programming).
int checked_group(const std::string& name, const std::vector<int>& ranks, int rank, int world);
/// The communicator among `ranks` of a shared world.
std::shared_ptr<Communicator> make_group(std::shared_ptr<WorldCore> core, std::string name, std::vector<int> ranks);

}  // namespace capstan::comm
