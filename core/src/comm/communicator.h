// defines: Communicator, Handle, Collective, CommRecord: collectives among the ranks of one group.
#pragma once
#include <capstan/dtype.h>
#include <capstan/export.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

enum class Reduction : std::uint8_t { sum, max, min };

/// A collective under way. Dropping it without wait() waits.
class CAPSTAN_API Handle {
 public:
  struct Operation {
    virtual ~Operation() = default;
    virtual void wait() = 0;         ///< throws what the operation met, once
    virtual bool done() = 0;
  };
  Handle() = default;                ///< of nothing: done
  explicit Handle(std::shared_ptr<Operation> operation) : operation_(std::move(operation)) {}
  Handle(Handle&&) noexcept = default;
  Handle& operator=(Handle&& o) noexcept { drop(); operation_ = std::move(o.operation_); return *this; }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { drop(); }
  void wait() { if (operation_) { auto o = std::move(operation_); operation_.reset(); o->wait(); } }
  bool done() const { return !operation_ || operation_->done(); }

 private:
  void drop() noexcept;
  std::shared_ptr<Operation> operation_;
};

/// One row of a communicator's ledger.
struct CommRecord {
  std::string collective;            ///< "all_gather"
  std::int64_t calls = 0;
  double bytes = 0;                  ///< that this rank sent, as the algorithm over a network would: a reduction (n-1)/n of its input
  double seconds = 0;                ///< from its start to its end
  double waited = 0;                 ///< that wait() stood still: what compute did not hide
};

/// Collectives among the ranks of a group, in host order: every rank of the group makes the same calls in the same
/// order. Counts are elements; f32, f64, bf16 (added in f32, rounded once), i32, i64, u8. Sums add in rank order,
/// so that every rank gets the same bits in every run. All calls return at once; buffers stay untouched until wait().
/// A group of one is a no-op that copies. Data is host memory for the CPU backends, a GPU's for the others (comm/gpu_world.h).
/// Errors: Error(runtime) naming communicator, collective, step and the rank that did not come or failed.
class CAPSTAN_API Communicator {
 public:
  virtual ~Communicator();
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(ranks_.size()); }
  const std::vector<int>& ranks() const { return ranks_; }          ///< world ranks of the group, in group order
  const std::string& name() const { return name_; }                 ///< "shard/gather"

  virtual Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op = Reduction::sum) = 0;
  /// in: size() blocks of `count`; out: block rank() summed over the ranks. `out` may be in's own block.
  virtual Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op = Reduction::sum) = 0;
  /// in: `count`; out: size() blocks. `in` may be out's own block.
  virtual Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) = 0;
  /// Blocks of any sizes: counts[r] elements of rank r, one after the other in `out`.
  virtual Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) = 0;
  /// in: size() blocks, block r for rank r; out: block r from rank r.
  virtual Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) = 0;
  virtual Handle all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                              std::span<const std::int64_t> receive_counts, DType dtype) = 0;
  virtual Handle broadcast(void* data, std::int64_t count, DType dtype, int root) = 0;
  /// Pairs match in order for each (from, to). send() is done when `data` may be changed.
  virtual Handle send(const void* data, std::int64_t count, DType dtype, int to) = 0;
  virtual Handle receive(void* data, std::int64_t count, DType dtype, int from) = 0;
  virtual void barrier() = 0;

  /// Says that collectives of this communicator will read and write `bytes` of World::shared_memory(), and keeps them: what a
  /// library can register is registered. All ranks, with the same size.
  virtual void adopt(std::shared_ptr<void> memory, std::size_t bytes);

  /// Rows so far, one per collective used; safe from any thread.
  std::vector<CommRecord> ledger() const;
  void clear_ledger();

 protected:
  Communicator(std::string name, std::vector<int> ranks, int rank) : name_(std::move(name)), ranks_(std::move(ranks)), rank_(rank) {}
  /// Adds to the row of `collective`.
  void record(std::string_view collective, std::int64_t calls, double bytes, double seconds, double waited);

 private:
  mutable std::mutex ledger_mutex_;
  std::vector<CommRecord> ledger_;
  std::string name_;
  std::vector<int> ranks_;
  int rank_;                         ///< within the group
};

/// All ranks of a job, and the way to make communicators among them.
class CAPSTAN_API World {
 public:
  virtual ~World();
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int local_rank() const = 0;   ///< among the ranks of this host
  virtual int local_size() const = 0;
  virtual std::string_view backend() const = 0;  ///< "single", "threads", "mpi"
  /// A communicator among `ranks` (world ranks, ascending; this one among them). Collective over `ranks` only: every
  /// member calls with the same name and list. Kept by the caller.
  virtual std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) = 0;
  /// Memory that the ranks of this host can read in place: collectives whose sources all lie in such memory copy once
  /// instead of twice (all_reduce: data; reduce_scatter, all_gather: in; broadcast: the root's data). For buffers that live
  /// long; not cleared. Ordinary memory where the host has no room left for more, and for a world of one. Among GPUs: memory of
  /// this rank's, the kind that its communicators like best.
  virtual std::shared_ptr<void> shared_memory(std::size_t bytes);
  /// Why collectives cannot be part of a device's record (kernels/queue.h). "": they can, but for send() and receive(); all ranks
  /// then make the same ones in it, and replay it together.
  virtual std::string cannot_record() const;
  /// `work` replays such a record: it ends within the timeout, as a collective does, or the job fails.
  virtual void replay(const std::function<void()>& work) { work(); }
  /// What the watchdog says about this rank when it is waited for: the training step and what it does.
  virtual void at(std::int64_t step, std::string_view doing) = 0;
  /// This rank leaves with an error: tells all other ranks, whose waits then throw Error(runtime) naming this rank, its
  /// step and `message`. True when this rank is the one to print `message`: the first that failed, or that found who
  /// did; the others leave silently. Call it with what() of whatever ends the rank, errors of collectives included.
  virtual bool fail_job(const std::string& message) noexcept = 0;
  /// Ends this rank's process after fail_job(), with this exit code, and does not hang whatever the others do: other
  /// processes of the job are ended too once they had a moment to see the message. Threads as ranks: throws
  /// Error(programming), they just return.
  [[noreturn]] virtual void end_failed(int exit_code) = 0;
  /// Seconds that a rank is waited for.
  virtual double timeout() const = 0;
};

/// One rank: no MPI, no thread.
CAPSTAN_API std::shared_ptr<World> make_single_world();
/// `size` ranks as threads of this process, for tests: worlds[r] is used by thread r alone. `timeout_seconds`: how long
/// a rank is waited for.
CAPSTAN_API std::vector<std::shared_ptr<World>> make_thread_worlds(int size, double timeout_seconds = 60);

}  // namespace capstan
