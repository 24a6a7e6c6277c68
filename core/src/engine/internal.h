// defines: Engine::Reducing, Engine::Summing, held_type(): what the engine's own source files share.
#pragma once
#include "engine/engine.h"

#include <optional>

namespace capstan {

/// A reduce-scatter under way: the unit's whole gradient stays in the pool until it has ended.
struct Engine::Reducing {
  std::size_t unit;
  std::int64_t at;                        // of the whole gradient in the pool
  std::optional<std::int64_t> message;    // of its narrow copy
  std::optional<std::int64_t> received;   // of everybody's narrow copies of this rank's piece, where they are added here
  bool last;                              // nothing more comes in this step
  Handle handle;
};

/// The sum of a step's gradient over ranks under way: over the pieces where it was kept whole, then over replicas.
struct Engine::Summing {
  std::size_t unit;
  Tensor message, received;  // narrow copies, as in Reducing
  Handle pieces, replicas;
  bool pieces_ended = false, replicas_started = false;
};

/// Of Unit::master.
inline DType held_type(const EngineOptions& options) { return options.gradients ? master_type(options.compute) : options.compute; }

}  // namespace capstan
