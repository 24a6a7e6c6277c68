// Some calls forward, and backward call by call.
#include "model/call_run.h"

#include <algorithm>
#include <utility>

namespace capstan {

bool is_head(const Call& call) { return dynamic_cast<Head*>(call.block) != nullptr; }

namespace {

/// The leaves of a block's parameters, shared ones included.
std::vector<std::shared_ptr<Node>> leaves_of(const Block& block) {
  std::vector<std::shared_ptr<Node>> leaves;
  for (const Parameter* p : block.parameters())
    if (p->trainable() && p->leaf() != nullptr) leaves.push_back(p->local().node());
  return leaves;
}

Leaf& as_leaf(const std::shared_ptr<Node>& node) { return static_cast<Leaf&>(*node); }

}  // namespace

CallRun::CallRun(std::span<const Call> calls, ForwardContext& context, const WalkHooks& hooks, bool recompute_all)
    : calls_(calls), context_(context), hooks_(hooks), recompute_all_(recompute_all),
      promises_(std::any_of(calls.begin(), calls.end(), [this](const Call& c) { return recomputes(c); })) {}

bool CallRun::recomputes(const Call& call) const { return call.recompute || (recompute_all_ && !is_head(call)); }

CallRun::Trace CallRun::run(const Call& call, bool keep_graph) {
  Trace trace;
  trace.call = &call;
  for (const std::string& name : call.reads) {
    if (!context_.has(name)) continue;  // the first call reads the batch alone
    const Tensor leaf = make_leaf(context_.get(name), false);
    trace.reads.emplace_back(name, leaf);
    context_.set(name, keep_graph ? leaf : leaf.detach());
  }
  const std::size_t before = context_.losses().size();
  // A leaf's hook waits for the last use of all: what a call will do when it is run again counts from its forward on.
  std::vector<std::pair<std::shared_ptr<Node>, int>> uses;
  if (promises_)
    for (std::shared_ptr<Node>& leaf : leaves_of(*call.block)) uses.emplace_back(leaf, as_leaf(leaf).uses());
  const bool grad = context_.grad;
  context_.grad = keep_graph;
  {
    ForwardContext::CallMark mark(context_, call);
    call.block->forward(context_);
  }
  context_.grad = grad;
  for (auto& [leaf, at_first] : uses) {
    if (!keep_graph) as_leaf(leaf).used(), trace.promised.push_back(leaf);
    else if (as_leaf(leaf).uses() > at_first) used_leaves_.insert(leaf.get());
  }
  for (const std::string& name : call.writes)
    if (context_.has(name)) trace.writes.emplace_back(name, context_.get(name));
  for (std::size_t i = before; i < context_.losses().size(); ++i)
    if (context_.losses()[i].sum.requires_grad()) trace.losses.emplace_back(context_.losses()[i].sum, context_.losses()[i].weight);
  for (auto& [name, value] : trace.writes) context_.set(name, value.detach());
  return trace;
}

/// The call was run again: its real uses are recorded. `before`: what was outstanding ahead of that.
void CallRun::keep_promises(const Trace& trace, const std::vector<int>& before) {
  for (std::size_t i = 0; i < trace.promised.size(); ++i) {
    Leaf& leaf = as_leaf(trace.promised[i]);
    if (before[i] == 0) continue;  // an engine has taken the gradient and cleared the leaf since
    if (leaf.uses() > 1 || used_leaves_.contains(&leaf)) {
      leaf.done();
      continue;
    }
    auto hook = std::exchange(leaf.hook, {});  // nothing has used it at all
    leaf.done();
    leaf.hook = std::move(hook);
  }
}

void CallRun::forward() {
  traces_.reserve(calls_.size());
  for (const Call& call : calls_) {
    if (hooks_.before) hooks_.before(call, WalkStep::forward);
    traces_.push_back(run(call, !recomputes(call)));
    if (recomputes(call)) traces_.back().writes.clear();
    if (hooks_.after) hooks_.after(call, WalkStep::forward);
  }
  context_.drop_loss_graphs();
}

void CallRun::backward(ValueGradients& grads, Part part) {
  const WalkStep::Kind step = part == Part::both ? WalkStep::backward : WalkStep::input;
  while (!traces_.empty()) {
    Trace trace = std::move(traces_.back());
    traces_.pop_back();
    const Call& call = *trace.call;
    if (hooks_.before) hooks_.before(call, step);
    if (recomputes(call)) {
      for (auto& [name, leaf] : trace.reads) context_.set(name, leaf.detach());
      ForwardContext::LossMark mark(context_);  // its losses are in the ledger already
      std::vector<int> before;
      for (const std::shared_ptr<Node>& leaf : trace.promised) before.push_back(as_leaf(leaf).uses());
      Trace again = run(call, true);
      keep_promises(trace, before);
      trace.reads = std::move(again.reads), trace.writes = std::move(again.writes), trace.losses = std::move(again.losses);
    }
    std::vector<Tensor> roots, root_grads;
    for (auto& [name, value] : trace.writes) {
      auto it = grads.find(name);
      if (it == grads.end()) continue;
      if (value.requires_grad()) roots.push_back(value), root_grads.push_back(it->second);
      grads.erase(it);
    }
    for (auto& [sum, weight] : trace.losses)
      roots.push_back(sum), root_grads.push_back(Tensor::full(sum.shape(), weight, sum.dtype(), sum.device()));
    trace.writes.clear();
    trace.losses.clear();
    for (auto& name : call.writes) context_.drop(name);
    Deferred deferred;
    if (!roots.empty()) deferred = capstan::backward(roots, root_grads, part);
    if (part == Part::input) deferred_.emplace_back(&call, std::move(deferred));
    roots.clear();
    for (auto& [name, leaf] : trace.reads) {
      auto* l = static_cast<Leaf*>(leaf.node().get());
      if (!l->has_grad()) continue;
      Tensor& sum = grads[name];
      if (sum.defined()) {
        Leaf adder(false);
        adder.add(sum), adder.add(l->grad());
        sum = adder.grad();
      } else {
        sum = l->grad();
      }
    }
    if (hooks_.after) hooks_.after(call, step);
  }
}

void CallRun::backward_weight() {
  for (auto& [call, deferred] : deferred_) {
    if (hooks_.before) hooks_.before(*call, WalkStep::weight);
    deferred.run();
    if (hooks_.after) hooks_.after(*call, WalkStep::weight);
  }
  deferred_.clear();
}

}  // namespace capstan
