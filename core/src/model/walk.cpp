// The walk over a model's calls: forward, and backward call by call.
#include <capstan/walk.h>

#include <algorithm>
#include <map>

namespace capstan {

namespace {

/// What the backward of one call needs.
struct Trace {
  const Call* call = nullptr;
  std::vector<std::pair<std::string, Tensor>> reads;   // leaves
  std::vector<std::pair<std::string, Tensor>> writes;  // with the call's graph; empty when it is recomputed
  std::vector<std::pair<Tensor, double>> losses;
};

bool is_head(const Call& call) { return dynamic_cast<Head*>(call.block) != nullptr; }

Trace run(const Call& call, ForwardContext& context, bool keep_graph) {
  Trace trace;
  trace.call = &call;
  for (const std::string& name : call.reads) {
    if (!context.has(name)) continue;  // the first call reads the batch alone
    const Tensor leaf = make_leaf(context.get(name), false);
    trace.reads.emplace_back(name, leaf);
    context.set(name, keep_graph ? leaf : leaf.detach());
  }
  const std::size_t before = context.losses().size();
  const bool grad = context.grad;
  context.grad = keep_graph;
  call.block->forward(context);
  context.grad = grad;
  for (const std::string& name : call.writes)
    if (context.has(name)) trace.writes.emplace_back(name, context.get(name));
  for (std::size_t i = before; i < context.losses().size(); ++i)
    if (context.losses()[i].sum.requires_grad()) trace.losses.emplace_back(context.losses()[i].sum, context.losses()[i].weight);
  for (auto& [name, value] : trace.writes) context.set(name, value.detach());
  return trace;
}

}  // namespace

void run_forward(Model& model, ForwardContext& context, bool with_heads) {
  const Runtime* runtime = model.runtime();
  for (const Call& call : model.calls()) {
    if (!with_heads && is_head(call)) continue;
    if (runtime != nullptr && runtime->hooks.before) runtime->hooks.before(call, false);
    call.block->forward(context);
    if (runtime != nullptr && runtime->hooks.after) runtime->hooks.after(call, false);
  }
}

void forward_backward(Model& model, ForwardContext& context, const WalkHooks& hooks, bool recompute_all) {
  const auto recomputes = [&](const Call& call) { return call.recompute || (recompute_all && !is_head(call)); };
  std::vector<Trace> traces;
  traces.reserve(model.calls().size());
  for (const Call& call : model.calls()) {
    if (hooks.before) hooks.before(call, false);
    traces.push_back(run(call, context, !recomputes(call)));
    if (recomputes(call)) traces.back().writes.clear();
    if (hooks.after) hooks.after(call, false);
  }
  context.drop_loss_graphs();

  std::map<std::string, Tensor> grads;
  while (!traces.empty()) {
    Trace trace = std::move(traces.back());
    traces.pop_back();
    const Call& call = *trace.call;
    if (hooks.before) hooks.before(call, true);
    if (recomputes(call)) {
      for (auto& [name, leaf] : trace.reads) context.set(name, leaf.detach());
      ForwardContext::LossMark mark(context);  // its losses are in the ledger already
      Trace again = run(call, context, true);
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
    for (auto& name : call.writes) context.drop(name);
    if (!roots.empty()) backward(roots, root_grads);
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
    if (hooks.after) hooks.after(call, true);
  }
}

}  // namespace capstan
