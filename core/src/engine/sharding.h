// defines: Strategy, Sharding, GradientState: what is kept in pieces over the shard and context axes.
#pragma once
#include <cstdint>

namespace capstan {

/// Names of the usual placements (docs/maintainers/mesh.md).
enum class Strategy : std::uint8_t { ddp, zero1, zero2, fsdp };

/// What each rank keeps of a unit: the whole, or its piece. Parameters or gradients in pieces need an optimizer in pieces.
/// Gradients that are whole until the step's end with an optimizer in pieces are scattered there.
struct Sharding {
  bool parameter = false, gradient = false, optimizer = false;
  static constexpr Sharding of(Strategy s) { return {s == Strategy::fsdp, s >= Strategy::zero2, s >= Strategy::zero1}; }
};

/// Of a unit's gradient between walks.
struct GradientState {
  bool filled = false;  ///< its piece holds something
  bool summed = false;  ///< over all ranks: nothing more comes in this step
};

}  // namespace capstan
