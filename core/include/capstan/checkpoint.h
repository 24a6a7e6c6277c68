// defines: Box, SavedTensor, CheckpointFormat: how tensors lie in a checkpoint's files. Core owns the
// protocol (folders, manifest, checksums, commit order); a format only reads and writes shard files.
#pragma once
#include <capstan/tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace capstan {

/// A part of a global tensor: element ranges [begin, begin + extent) in each dimension.
struct Box { std::vector<std::int64_t> begin, extent; };

/// One piece of a tensor in a shard file. Bytes are row-major little-endian, contiguous.
struct SavedTensor {
  std::string name;                       ///< "layers.3.attention.qkv.weight", "optimizer/m/layers..."
  DType dtype = DType::f32;
  std::vector<std::int64_t> global_shape;
  Box box;
  const void* data = nullptr;             ///< to write; null when described from a file
  std::int64_t bytes = 0;
  std::uint64_t xxh3 = 0;                 ///< of the bytes; filled by core
  std::string file;                       ///< shard file, relative to the checkpoint's folder
  std::int64_t file_offset = -1;          ///< of the payload in that file; filled by the format
};

/// Interface of plugin kind "checkpoint". All calls come from one thread.
class CAPSTAN_API CheckpointFormat {
 public:
  virtual ~CheckpointFormat();
  virtual std::string_view name() const = 0;
  virtual std::string_view extension() const = 0;  ///< ".h5"
  /// Writes one shard file and flushes it to the disk (fsync). Fills file_offset of each tensor.
  /// `progress` is called between writes with the bytes so far.
  virtual void write_shard(const std::string& path, std::span<SavedTensor> tensors,
                           const std::function<void(std::int64_t)>& progress) = 0;
  /// Reads the payload of one tensor into `target`; checks that the file's shape and dtype agree with it.
  virtual void read(const std::string& path, const SavedTensor& tensor, void* target) = 0;
  /// Writes a convenience index over all shards so that the format's own tools see whole tensors.
  virtual void write_index(const std::string& path, std::span<const SavedTensor> tensors) = 0;
};

}  // namespace capstan
