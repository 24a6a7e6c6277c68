// defines: MeshAxis, MeshFault, MeshLayout: which ranks stand together along which axis. A pure value: no communication.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

struct MeshAxis {
  std::string name;
  int size = 1;
  bool operator==(const MeshAxis&) const = default;
};

/// Why axes do not make a mesh over a number of ranks.
struct MeshFault {
  std::string axis;                           ///< that is wrong, or most likely so; "" when it is none of them
  std::string message;                        ///< what is wrong and what would be right
  std::vector<std::vector<MeshAxis>> fixes;   ///< whole meshes near to the one asked for, the nearest first; each is valid
};

/// Ranks 0 .. world-1 as a row-major grid of named axes, the last one fastest. The training mesh has the axes
/// pp, replicate, shard, context, tensor in that order; the expert view unflattens the same ranks to pp,
/// replicate, expert_shard, expert. Slices and flattenings are layouts over the same ranks. Everything here is
/// arithmetic: a layout of 100,000 ranks is made and checked in milliseconds.
class CAPSTAN_API MeshLayout {
 public:
  /// One rank, no axis.
  MeshLayout() = default;
  /// `axes` cover `world` ranks; at most one size may be -1: what is left. Error(input) naming the axis and what would be valid.
  static MeshLayout make(std::vector<MeshAxis> axes, int world);
  /// What make() would say; nothing when it would not throw.
  static std::optional<MeshFault> check(const std::vector<MeshAxis>& axes, int world);

  int world() const { return world_; }                    ///< ranks of the whole mesh
  const std::vector<MeshAxis>& axes() const { return axes_; }
  int size(std::string_view axis) const;                  ///< 1 for an axis that the layout lacks
  bool has(std::string_view axis) const;

  /// Coordinates of `rank` along axes(), in their order; and back. Error(programming) out of range.
  std::vector<int> coordinate(int rank) const;
  int coordinate(int rank, std::string_view axis) const;
  int rank_at(std::span<const int> coordinate) const;

  /// Ranks that share `rank`'s coordinates on every axis but these, ascending: row-major in the layout's order of axes,
  /// whatever order the names come in. Axes that the layout lacks count as size 1.
  std::vector<int> group(int rank, std::span<const std::string_view> axes) const;
  std::vector<int> group(int rank, std::string_view axis) const;
  /// Every group along these axes, in order of their first rank.
  std::vector<std::vector<int>> groups(std::span<const std::string_view> axes) const;

  /// The mesh of one group along these axes, which are named in the layout's order: its rank i is group(rank, axes)[i].
  /// Error(input) for an axis that is unknown, out of order or named twice.
  MeshLayout slice(std::span<const std::string_view> axes) const;
  /// Neighbouring axes as one: {shard, context} -> "fsdp". Error(input) when they are not neighbours or the name is taken.
  MeshLayout flatten(std::span<const std::string_view> axes, std::string name) const;
  /// One axis as several, outer first; their sizes multiply to its own. Error(input).
  MeshLayout unflatten(std::string_view axis, std::vector<MeshAxis> into) const;
  /// pp, replicate, expert_shard, expert over the same ranks: `expert` must divide shard * context * tensor. Only for
  /// the training mesh and what is sliced from it. Error(input).
  MeshLayout expert_view(int expert) const;

  /// Equal on all ranks of a job, or they do not mean the same mesh.
  std::uint64_t digest() const;
  /// "pp 2 x shard 4 x tensor 2 (16 ranks)": axes of size 1 left out.
  std::string describe() const;
  bool operator==(const MeshLayout&) const = default;

 private:
  std::vector<MeshAxis> axes_;
  int world_ = 1;
};

}  // namespace capstan
