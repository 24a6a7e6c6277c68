// defines: Engine::Reducing, master_type(): what the engine's own source files share.
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
  Handle handle;
};

inline DType master_type(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace capstan
