// defines: Manifest, the description of one checkpoint (MANIFEST.json), and verify(): what on the disk
// differs from it. Nothing here depends on a checkpoint format.
#pragma once
#include "checkpoint/boxes.h"
#include "checkpoint/files.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace capstan::checkpoint {

/// The version that this program writes. It reads every version from 1 to this one.
inline constexpr int format_version = 1;
inline constexpr const char* manifest_name = "MANIFEST.json";
inline constexpr const char* state_name = "state.json";
inline constexpr const char* latest_name = "LATEST";

struct FileRecord {
  std::int64_t bytes = 0;
  std::uint64_t xxh3 = 0;
};

/// One stored piece of a tensor.
struct StoredBox {
  Box box;
  std::string file;
  std::int64_t offset = -1;  ///< of the payload in the file; -1 when the format has no plain payload
  std::int64_t bytes = 0;
  std::uint64_t xxh3 = 0;  ///< of the payload
};

struct StoredTensor {
  DType dtype = DType::f32;
  Shape global_shape;
  std::vector<StoredBox> boxes;  ///< tile the global shape exactly once
};

struct Manifest {
  std::int64_t step = 0;
  std::string format;   ///< name of the checkpoint plugin
  std::string program;  ///< version of Capstan that wrote it
  std::map<std::string, FileRecord> files;
  std::map<std::string, StoredTensor> tensors;

  CAPSTAN_API std::int64_t bytes() const;  ///< of all files
};

/// Why `name` cannot be a tensor's name, or "". Names are '/'-separated components of printable UTF-8; none is
/// empty, "." or "..".
CAPSTAN_API std::string name_fault(const std::string& name);

/// A sound manifest of a version that this program does not read: no damage, so nothing to fall back from.
class UnknownVersion : public Error {
  using Error::Error;
};

/// JSON text; holds the xxh3 of its own content. Throws Error(programming) when a tensor's boxes do not tile
/// it, a file is unknown, or a name is unfit.
CAPSTAN_API std::string to_json(const Manifest& manifest);
/// Strict inverse: any unknown, missing, ill-typed or inconsistent field is Error(input) naming `where`;
/// another version is UnknownVersion.
CAPSTAN_API Manifest parse_manifest(const std::string& text, const std::string& where);
/// Reads and parses folder/MANIFEST.json; also throws Unreadable.
CAPSTAN_API Manifest read_manifest(const Path& folder);

/// What on the disk differs from the manifest.
struct Problem {
  std::string file, tensor;  ///< tensor: "" when not known or not about one
  std::string text;          ///< the whole sentence, with file and tensor
  bool fatal = true;         ///< false: loading does not need it (an index, a stray file)
  /// Set when the file could not be read for a reason that is not its content, which may be whole: whose fault that is.
  std::optional<Fault> unreadable = std::nullopt;
};

/// Checks every file's presence, size and checksum, and names the tensors whose payload is damaged.
CAPSTAN_API std::vector<Problem> verify(const Path& folder, const Manifest& manifest);
/// The same; a manifest that cannot be read is the only problem then.
CAPSTAN_API std::vector<Problem> verify(const Path& folder);

}  // namespace capstan::checkpoint
