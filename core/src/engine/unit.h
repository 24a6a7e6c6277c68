// defines: Unit: the parameters of a block in flat buffers, whole or in pieces.
#pragma once
#include "comm/communicator.h"
#include "engine/sharding.h"
#include "mesh/placement.h"

#include <capstan/optimizer.h>
#include <capstan/parameter.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan {

/// One parameter in a unit: its local tensor (under tensor parallelism) lies at `offset` of the flat buffers.
struct UnitParameter {
  Parameter* parameter = nullptr;
  std::shared_ptr<const TensorPlacement> placement;  ///< null: local is global
  Dims shape;                                        ///< local
  std::int64_t offset = 0;
  std::int64_t numel() const { return shape.product(); }
};

/// Elements [begin, end) of parameter `index`, row-major in its local tensor.
struct UnitPart {
  std::size_t index = 0;
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
};

/// One state of the optimizer over the unit's parts that have it, one after the other.
struct UnitState {
  std::string name;
  DType dtype = DType::f32;
  std::int64_t size = 0;
  std::vector<std::pair<std::size_t, std::int64_t>> offsets;  ///< index in `parts` -> offset in `flat`
  Tensor flat;
};

/// Flat buffers over one block's parameters. The buffer is cut into `pieces` equal pieces; this rank's is `rank`.
/// `region` is what the optimizer here works on: that piece, or all of it.
class Unit {
 public:
  /// Elements; parameters and pieces start on cache lines.
  static constexpr std::int64_t line = 16;
  static std::int64_t round_up(std::int64_t n) { return (n + line - 1) / line * line; }

  void add(Parameter* parameter, std::shared_ptr<const TensorPlacement> placement);
  /// Closes the list: sets the sizes.
  void cut(int pieces, int rank, bool optimizer_in_pieces);

  std::vector<UnitParameter> parameters;
  std::vector<UnitPart> parts;               ///< of the region
  std::int64_t size = 0, piece = 0;          ///< elements: all, padded; one piece
  std::int64_t piece_begin = 0;
  std::int64_t region_begin = 0, region = 0;

  Tensor whole;        ///< [size] working copies; its memory comes and goes when parameters are in pieces
  Tensor whole_grad;   ///< [size]; likewise when gradients are in pieces
  Tensor master;       ///< [region]
  Tensor grad;         ///< [piece] or [size]: where the reduced gradient is found
  std::vector<UnitState> states;

  Tensor view(const Tensor& flat, std::size_t parameter) const;  ///< of a [size] buffer, local shape
  /// Part `p` of a [region] buffer: of local shape when the part is the whole parameter, else 1-D.
  Tensor part(const Tensor& flat, std::size_t p) const;
  Tensor state(const std::string& name, std::size_t p) const;    ///< likewise
  /// The region of the reduced gradient.
  Tensor region_grad() const { return grad.numel() == region ? grad : grad.narrow(0, region_begin, region); }
  /// This rank's piece of it.
  Tensor piece_grad() const { return grad.numel() == piece ? grad : grad.narrow(0, piece_begin, piece); }
  /// Runs of the piece that this rank counts: it is the first that holds them.
  const std::vector<std::pair<std::int64_t, std::int64_t>>& counted() const { return counted_; }
  /// Ranks along pp that hold the same unit (a parameter tied across stages), ascending; empty: this one alone. The first
  /// of them counts and saves it.
  std::vector<int> stages;
  std::shared_ptr<Communicator> across_stages, hosts_across_stages;
  bool first_stage = true;
  /// True when another tensor rank holds some of the same elements.
  bool replicated() const { return replicated_; }
  /// Parts of parameters within elements [begin, end) of the unit.
  std::vector<UnitPart> parts_in(std::int64_t begin, std::int64_t end) const;

 private:
  std::vector<std::pair<std::int64_t, std::int64_t>> counted_;
  bool replicated_ = false;
};

}  // namespace capstan
