// defines: Job, Link: one communicator of NCCL, the stream it works in, and the memory that it knows.
#pragma once
#include "comm/communicator.h"

#include <capstan/device.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

namespace capstan::comm {

struct Flight;

/// What all links of a rank share.
struct Job {
  std::shared_ptr<World> control;
  std::shared_ptr<Device> device;
  int gpu = 0;
  cudaStream_t compute = nullptr;
  /// Of the thread that makes records: the last collective of the one under way. Collectives of a record, of whatever communicator,
  /// go one after the other: the branches of a graph start in no order that ranks share, and each would hold up the other's.
  mutable unsigned long long record = 0;
  mutable std::shared_ptr<Flight> last_recorded;
  void bind(const std::string& where) const;
};

/// Throws Error(runtime) at `where`.
void check_cuda(cudaError_t code, const std::string& where);

class Link {
 public:
  /// Rank `rank` of `size`; returns when all have come. A rank that does not come ends the job within its timeout.
  Link(const Job& job, const std::string& name, const ncclUniqueId& id, int size, int rank);
  /// Lets NCCL end what is under way, for as long as the timeout; the registered memory is free only when NCCL has let go of it.
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  ncclComm_t comm() const { return comm_; }
  cudaStream_t stream() const { return stream_; }
  /// Error(runtime) at `where` unless NCCL took the call.
  void check(ncclResult_t code, const std::string& where) const;
  /// Waits until NCCL has taken what it was asked for.
  void settle(const std::string& where);
  /// What went wrong since; "" when nothing did.
  std::string fault() const;
  /// Ends what is under way, on the GPU too: who waits for it goes on, and the link is of no use. From any thread. Returns only
  /// when the records that the link is part of are gone.
  void abort();
  /// Held around a call of NCCL, so that abort() does not take the communicator away from it; throws at `where` once it is gone.
  std::unique_lock<std::mutex> use(const std::string& where) const;
  /// Registers memory of ncclMemAlloc and keeps it: as a symmetric window where this NCCL and these GPUs have such, else for
  /// this rank alone. All ranks of the link, with the same size.
  void adopt(std::shared_ptr<void> memory, std::size_t bytes);

 private:
  /// Nothing of NCCL yet: what throws in the public constructor comes through the destructor.
  Link(const Job& job, const std::string& name) : job_(job), name_(name) {}
  bool wait_for_state() const;
  void deregister() noexcept;
  /// NCCL writes the two from a thread of its own, also after the call has returned: they do not move.
  struct Adopted {
    std::shared_ptr<void> memory;
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
    ncclWindow_t window = nullptr;
#endif
    void* handle = nullptr;  // of ncclCommRegister
  };
  const Job& job_;
  std::string name_;
  mutable std::mutex mutex_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::deque<Adopted> adopted_;
  bool stuck_ = false;  // NCCL failed, or did not end in time: it is not asked for more
  std::int64_t bytes_ = 0;  // that the communicator took
};

/// Memory that NCCL can register on every path; null when there is none left.
std::shared_ptr<void> nccl_memory(const Job& job, std::size_t bytes);

}  // namespace capstan::comm
