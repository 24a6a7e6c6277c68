// defines: CallRun: some neighbouring calls of a model on one microbatch, from their forward to the end of their backward.
#pragma once
#include <capstan/export.h>
#include <capstan/walk.h>

#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace capstan {

/// Gradients of carried values.
using ValueGradients = std::map<std::string, Tensor>;

/// All calls of a model are one run (forward_backward()); a pipeline stage is one of several. The graph is cut at calls:
/// each keeps its own until its turn comes in reverse. Runs of several microbatches live side by side, each with its own
/// context. `calls`, `context` and `hooks` outlive the run.
class CAPSTAN_API CallRun {
 public:
  CallRun(std::span<const Call> calls, ForwardContext& context, const WalkHooks& hooks, bool recompute_all);

  /// Carried values that earlier calls wrote are in the context; so are those of these calls afterwards.
  void forward();
  /// In: the gradients of carried values as later calls left them. Out: those that earlier calls have to take. With
  /// Part::input the parameters' gradients wait for backward_weight().
  void backward(ValueGradients& grads, Part part = Part::both);
  void backward_weight();

 private:
  /// What the backward of one call needs.
  struct Trace {
    const Call* call = nullptr;
    std::vector<std::pair<std::string, Tensor>> reads;   // leaves
    std::vector<std::pair<std::string, Tensor>> writes;  // with the call's graph; empty when it is recomputed
    std::vector<std::pair<Tensor, double>> losses;
    std::vector<std::shared_ptr<Node>> promised;         // leaves of which the call that is run again counts as a use
  };
  Trace run(const Call& call, bool keep_graph);
  bool recomputes(const Call& call) const;
  void keep_promises(const Trace& trace, const std::vector<int>& before);

  std::span<const Call> calls_;
  ForwardContext& context_;
  const WalkHooks& hooks_;
  bool recompute_all_;
  std::vector<Trace> traces_;
  std::vector<std::pair<const Call*, Deferred>> deferred_;
  bool promises_ = false;              // some call is run again
  std::set<const Node*> used_leaves_;  // in a graph of this run
};

/// True when `call` runs a head.
bool is_head(const Call& call);

}  // namespace capstan
