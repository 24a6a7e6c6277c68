// defines: the layout of <run>/checkpoints and the commit of one checkpoint into it.
//
// A commit writes step_000100.tmp-<attempt>/, fsyncs every file and the folder, moves an older step_000100
// aside as .superseded, renames, fsyncs the parent, and then replaces LATEST in the same way. Before the
// rename the old checkpoint is the newest, after it the new one is; no moment has neither.
#pragma once
#include "checkpoint/manifest.h"

#include <functional>
#include <optional>
#include <string_view>

namespace capstan::checkpoint {

/// Called with the name of each stage that a save has reached; tests end the process in it.
using FaultHook = std::function<void(std::string_view stage)>;

/// The names of all stages, in the order in which a save reaches them.
CAPSTAN_API std::span<const std::string_view> save_stages();

/// "step_000100".
CAPSTAN_API std::string step_name(std::int64_t step);
/// The step of a folder's name; nothing for any other name, temporary and trashed ones included.
CAPSTAN_API std::optional<std::int64_t> step_of(std::string_view folder_name);
inline constexpr std::string_view superseded_suffix = ".superseded";
/// The same, and of a checkpoint that was set aside as superseded, which is one as long as it is there.
CAPSTAN_API std::optional<std::int64_t> step_kept_in(std::string_view folder_name);

/// Removes what killed saves left (temporary, trashed and superseded folders, LATEST.tmp) and puts a
/// superseded checkpoint back whose successor was never renamed in. Only for the one process that saves here.
CAPSTAN_API void clean(const Path& root);

/// Removes all but the newest `keep` checkpoints up to step `newest` (0 keeps all). Never the one that LATEST
/// names, nor later steps (of a part of the run that was rolled back; the run replaces them as it gets there).
void retain_newest(const Path& root, std::int64_t newest, int keep, const std::string& attempt, const FaultHook& hook);

/// One attempt to commit one step. With several writers each calls write_shard() with its own index and what
/// it returns is gathered; create(), commit() and abandon() are the first writer's.
class CAPSTAN_API Attempt {
 public:
  /// `attempt` is any text fit for a file name that all writers agree on.
  Attempt(Path root, std::int64_t step, std::string attempt, FaultHook hook = {});

  void create();
  /// Writes the tensors as shard_<index>, reads it back, and checks that the disk has what was given. Fills
  /// file, file_offset and xxh3 of each tensor. Returns the shard's name and digest.
  std::pair<std::string, FileRecord> write_shard(CheckpointFormat& format, int index, std::span<SavedTensor> tensors);
  /// `tensors` and `shards` of all writers. Returns the bytes of the whole checkpoint, which is the newest from here on.
  std::int64_t commit(CheckpointFormat& format, std::span<const SavedTensor> tensors,
                      const std::map<std::string, FileRecord>& shards, const std::string& state_json);
  /// Removes the older checkpoint of the same step that commit() set aside.
  void remove_replaced();
  /// Removes the temporary folder, as far as that is possible. Never throws.
  void abandon() noexcept;

  const Path& folder() const { return temporary_; }

 private:
  void reached(std::string_view stage) const {
    if (hook_) hook_(stage);
  }
  void move_latest();

  Path root_, temporary_, final_, aside_;
  bool replaced_ = false;
  std::int64_t step_;
  std::string attempt_;
  FaultHook hook_;
};

}  // namespace capstan::checkpoint
