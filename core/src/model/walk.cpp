// Walks over all calls of a model.
#include <capstan/walk.h>

#include "model/call_run.h"

namespace capstan {

void run_forward(Model& model, ForwardContext& context, bool with_heads) {
  const Runtime* runtime = model.runtime();
  for (const Call& call : model.calls()) {
    if (!with_heads && is_head(call)) continue;
    if (runtime != nullptr && runtime->hooks.before) runtime->hooks.before(call, WalkStep::forward);
    call.block->forward(context);
    if (runtime != nullptr && runtime->hooks.after) runtime->hooks.after(call, WalkStep::forward);
  }
}

void forward_backward(Model& model, ForwardContext& context, const WalkHooks& hooks, bool recompute_all) {
  CallRun all(model.calls(), context, hooks, recompute_all);
  all.forward();
  ValueGradients grads;
  all.backward(grads);
}

}  // namespace capstan
