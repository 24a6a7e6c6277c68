// defines: load(), load_newest(): from checkpoints back into tensors of any sharding.
#pragma once
#include "checkpoint/commit.h"

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan::checkpoint {

/// Makes the format that a manifest names (through the plugin host).
using FormatMaker = std::function<std::shared_ptr<CheckpointFormat>(const std::string& name)>;

/// A box of a tensor that the caller holds, row-major and contiguous, of the box's extents: written to `target`, or given to `take`.
struct Wanted {
  std::string name;
  DType dtype = DType::f32;  ///< as it is stored
  Shape global_shape;
  Box box;
  void* target = nullptr;
  /// Without a target: gets the box, in memory that is the loader's and may be written to until it returns. Tensors come one
  /// after the other, so that no more than one is held for the sake of a cast or of another device.
  std::function<void(void*)> take{};
};

struct LoadOptions {
  /// Tensors of the checkpoint whose names begin so may stay unread ("optimizer/" when only serving).
  std::vector<std::string> leave_unread;
  /// Tensors of which this rank holds nothing but others do: not unexpected.
  std::vector<std::string> elsewhere;
};

struct Loaded {
  std::int64_t step = 0;
  Path folder;
  std::string state_json;
  std::vector<std::string> warnings;  ///< what is odd but harmless
};

/// The files of a checkpoint differ from its manifest: an older one may be good.
class CAPSTAN_API Damaged : public Error {
  using Error::Error;
};

struct Candidate {
  std::int64_t step = 0;
  Path folder;
};

/// The checkpoints in a folder, the one to resume from first: the one that LATEST names, then earlier steps
/// from new to old, then later ones (of a part of the run that was rolled back). A superseded folder stands
/// for its step while that is missing. `warn` hears of a LATEST that names nothing.
CAPSTAN_API std::vector<Candidate> candidates(const Path& root, const std::function<void(const std::string&)>& warn = {});

/// The run state of a checkpoint, checked against the manifest. Throws Damaged and Unreadable.
CAPSTAN_API std::string read_state(const Path& folder);

/// Fills every target. Checks names, shapes and element types in both directions first (Error(input) listing
/// what is missing, unexpected and different), then every file's checksum (Damaged, naming file and tensor),
/// and only then writes to the targets. What cannot be read at all is Unreadable. Stored boxes are cut to the wanted ones, whatever both shardings are.
CAPSTAN_API Loaded load(const Path& folder, std::span<const Wanted> wanted, const FormatMaker& make_format,
                        const LoadOptions& options = {});

enum class OnDamage { fall_back, stop };

/// Loads the first good one of candidates(root). `report` hears, in whole sentences, of every damaged
/// checkpoint that is passed over and of the one taken instead. Nothing when there is no checkpoint at all;
/// Damaged when all are damaged, or with OnDamage::stop when the first is. One that cannot be read for a reason that
/// is not its content may be good: it is never passed over, but Unreadable. The targets are undefined after an exception.
CAPSTAN_API std::optional<Loaded> load_newest(const Path& root, std::span<const Wanted> wanted,
                                              const FormatMaker& make_format, OnDamage on_damage,
                                              const std::function<void(const std::string&)>& report,
                                              const LoadOptions& options = {});

}  // namespace capstan::checkpoint
