// defines: Run, TensorPlacement: which elements of a parameter a rank holds under tensor parallelism.
#pragma once
#include <capstan/export.h>
#include <capstan/parameter.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace capstan {

/// Elements [begin, begin + length) of the cut dimension, global. The same run is held by `size(tensor) / ways`
/// neighbouring tensor ranks; their gradients of it add up.
struct Run { std::int64_t begin = 0, length = 0; int ways = 1; };

/// How one parameter lies over the tensor axis. At most one dimension is cut.
struct CAPSTAN_API TensorPlacement {
  int dim = -1;              ///< that is cut; -1: whole on every rank
  std::vector<Run> runs;     ///< of dimension `dim` (of dimension 0 when nothing is cut), in local order
  int size = 1, rank = 0;    ///< of the tensor axis
  Dims local;                ///< local shape

  bool cut() const { return dim >= 0; }
  /// True for the first of the ranks that hold `run`: it alone counts and saves it.
  bool owns(const Run& run) const { return rank % (size / run.ways) == 0; }
  /// Local extent of the segments named `part` along the cut dimension (0 when there is none).
  std::int64_t extent(const Parameter& parameter, std::string_view part) const;
};

/// Named axes that the tensor axis cuts, in every model: heads, kv_heads, mlp, vocab.
CAPSTAN_API std::span<const std::string_view> tensor_axes();

/// Cuts `parameter` over `size` tensor ranks for `rank`. Along a dimension whose segments lie on tensor axes, a segment of
/// k units is cut gcd(k, size) ways and the same cut is held by the ranks that are left over; "vocab" is cut size ways,
/// the last cuts shorter. Query heads and the key/value heads that they read are cut together, so that each rank holds
/// the keys and values of its queries: the largest s that divides gcd(heads, size) with s | kv_heads or kv_heads | s.
CAPSTAN_API TensorPlacement place_tensor(const Parameter& parameter, int size, int rank);

}  // namespace capstan
