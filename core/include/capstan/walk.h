// defines: run_forward(), forward_backward(): how core walks a model's calls.
#pragma once
#include <capstan/model.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace capstan {

class Mesh;

/// What a walk does with a call. A pipeline that fills its gaps takes the backward in two: the gradients of what the call
/// read (`input`), and those of its parameters when there is time (`weight`). As a bool: it is no forward.
struct WalkStep {
  enum Kind : std::uint8_t { forward, backward, input, weight };
};

/// What an engine is told while a walk goes on: before and after each call, in both directions. The gradients of a call's
/// parameters are there after `backward` and after `weight`, not after `input`; those of a head grow in its `forward`.
struct WalkHooks {
  std::function<void(const Call&, WalkStep::Kind)> before, after;
};

/// What an engine leaves with its model, so that every walk over it, an inference engine's too, finds the
/// parameters in their place.
struct Runtime {
  WalkHooks hooks;        ///< for walks without a graph
  Mesh* mesh = nullptr;
};

/// Runs the calls in order, without a graph when context.grad is off. The calls of heads are left out
/// unless `with_heads`.
CAPSTAN_API void run_forward(Model& model, ForwardContext& context, bool with_heads);

/// One microbatch, forward and backward. The graph is cut at calls: each keeps its own until its turn comes
/// in reverse; calls marked `recompute` (every call but heads' with `recompute_all`) keep only their inputs and
/// run again. Gradients end in the parameters' leaves; the losses stay in the context's ledger (without graphs).
/// Error(programming) when a block reads a carried value that its call does not declare, or writes one with a graph:
/// its gradient would be lost.
CAPSTAN_API void forward_backward(Model& model, ForwardContext& context, const WalkHooks& hooks = {}, bool recompute_all = false);

}  // namespace capstan
