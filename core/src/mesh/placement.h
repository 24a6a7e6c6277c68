// defines: Run, TensorPlacement: which elements of a parameter a rank holds under tensor parallelism.
#pragma once
#include <capstan/export.h>
#include <capstan/parameter.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace capstan {

/// Elements [begin, begin + length) of the cut dimension, global. The same run is held by `size(tensor) / ways`
/// neighbouring tensor ranks; their gradients of it add up.
struct Run { std::int64_t begin = 0, length = 0; int ways = 1; };

/// How one parameter lies over the tensor axis. At most one dimension is cut. A dimension on a tensor axis counts as cut
/// even when nothing divides it: then every rank holds and computes all of it, and each run says ways 1.
struct CAPSTAN_API TensorPlacement {
  int dim = -1;              ///< that is cut; -1: whole on every rank
  /// Of dimension `dim`, one for each of its segments, in local order; a length may be 0. When nothing is cut: one, all of
  /// dimension 0.
  std::vector<Run> runs;
  int size = 1, rank = 0;    ///< of the tensor axis
  Dims local;                ///< local shape

  bool cut() const { return dim >= 0; }
  /// True for the first of the ranks that hold `run`: it alone counts and saves it.
  bool owns(const Run& run) const { return rank % (size / run.ways) == 0; }
  /// Local extent of the segments named `part` along the cut dimension (dimension 0 when there is none).
  std::int64_t extent(const Parameter& parameter, std::string_view part) const;
};

/// Named axes that the tensor axis cuts, in every model: heads, kv_heads, mlp, vocab.
CAPSTAN_API std::span<const std::string_view> tensor_axes();

/// Cuts `parameter` over `size` tensor ranks for `rank`. Along a dimension whose segments lie on tensor axes, a segment of
/// k units is cut gcd(k, size) ways and the same cut is held by size / ways neighbouring ranks; "vocab" is cut size ways,
/// the last cuts shorter or empty. Units in g groups (Segment::groups; query heads beside "kv_heads" have as many groups as
/// there are of those) are cut so that each rank holds the keys and values of its queries: gcd(k, size) ways when g divides
/// size, else gcd(g, size) ways. Error(input) when two dimensions lie on tensor axes.
CAPSTAN_API TensorPlacement place_tensor(const Parameter& parameter, int size, int rank);

}  // namespace capstan
