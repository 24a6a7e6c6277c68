// defines: Snapshot, Saver: saves checkpoints behind the back of the training loop.
#pragma once
#include "checkpoint/commit.h"
#include "comm/communicator.h"

#include <capstan/checkpoint.h>
#include <capstan/export.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan::checkpoint {

/// All that a checkpoint holds. Tensor data must stay readable until save() returns.
struct Snapshot {
  std::vector<SavedTensor> tensors;  ///< name, dtype, global_shape, box, data, bytes; core fills the rest
  std::string state_json;            ///< of RunState
  std::int64_t step = 0;
};

struct SaverOptions {
  int keep = 3;              ///< newest checkpoints that stay; 0 keeps all
  bool asynchronous = true;  ///< false: save() returns when the checkpoint is on the disk, and copies nothing
  int copy_threads = 0;      ///< that take the snapshot; 0: half of the machine's logical cores, at least 1
  FaultHook fault_hook;      ///< for tests
  /// The ranks that save together, each its own shard; used by the savers' threads alone. Null: one writer.
  std::shared_ptr<Communicator> writers;
};

/// What the last finished save cost.
struct SaveReport {
  std::int64_t step = -1;
  std::int64_t bytes = 0;       ///< on the disk
  double waited_seconds = 0;    ///< save() waited for the save before it
  double snapshot_seconds = 0;  ///< save() copied the tensors
  double write_seconds = 0;     ///< the saver's thread wrote, checked and committed
};

/// Saves into one folder of checkpoints. One thread of its own makes all calls of the format and all file
/// operations; at most one save is in flight. Failed saves leave the previous checkpoints as they were and
/// are kept for take_error(): training goes on, and its loop says so.
///
/// With several writers each rank has a Saver and all its members are for all ranks: the first makes the folder, each
/// writes what it owns, and the first commits when every one has said that its shard is on the disk. One that fails fails
/// the save on all, and no rank is left waiting.
///
/// Loading uses the same format library from the caller's thread: wait() first when a save may be in flight.
class CAPSTAN_API Saver {
 public:
  /// Rank 0 makes `root`, locks it against other savers (Error(input) when one is at work) and cleans what killed
  /// saves left there.
  Saver(Path root, std::shared_ptr<CheckpointFormat> format, SaverOptions options);
  /// Waits for the save in flight.
  ~Saver();
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  /// Gets the staging buffer ready (allocated and faulted in) for tensors of these many bytes, so that the first save costs
  /// no more than the next and memory that is not there is missed before any training. Throws Error(runtime).
  void reserve(std::span<const std::int64_t> bytes);
  /// Waits for the previous save, copies the tensors, and returns; the copy may be changed at once. Throws
  /// Error(programming) on a malformed snapshot.
  void save(const Snapshot& snapshot);
  /// Waits until no save is in flight.
  void wait();
  bool busy() const;
  /// The error of a finished save, once. When last_report() is of that step, the checkpoint is good and only
  /// older ones could not be removed.
  std::optional<Error> take_error();
  /// Of the last save that succeeded; step -1 before.
  SaveReport last_report() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace capstan::checkpoint
