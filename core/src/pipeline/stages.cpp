// Cuts a model's calls into stages.
#include "pipeline/stages.h"

#include "model/call_run.h"

#include <algorithm>
#include <limits>

namespace capstan::pipeline {

std::vector<CallCost> call_costs(Model& model, std::int64_t samples, std::int64_t length, DType dtype, bool recompute, double flop_per_byte) {
  const std::shared_ptr<Device> meta = make_meta_device();
  const std::vector<std::int32_t> tokens(static_cast<std::size_t>(samples * length), 0);
  const std::vector<std::int32_t> lengths(static_cast<std::size_t>(samples), static_cast<std::int32_t>(length));
  return call_costs(model, make_batch(*meta, tokens, lengths, tokens), dtype, recompute, flop_per_byte);
}

std::vector<CallCost> call_costs(Model& model, const Batch& batch, DType dtype, bool recompute, double flop_per_byte) {
  Device* meta = &batch.space().starts.device();
  if (meta->kind() != DeviceKind::meta) fail(Fault::programming, "pipeline", "costs of calls are measured on the meta device, the batch is on " + std::string(meta->name()));
  for (Parameter* p : model.parameters()) p->place(Tensor::empty(p->shape(), dtype, *meta));
  ForwardContext context(batch, *meta, dtype);
  context.grad = context.training = true;

  std::vector<CallCost> costs(model.calls().size());
  WalkHooks hooks;
  hooks.before = [&](const Call&, WalkStep::Kind) { meta->clear_ledger(); };
  hooks.after = [&](const Call& call, WalkStep::Kind step) {
    CallCost& cost = costs[static_cast<std::size_t>(&call - model.calls().data())];
    double& part = step == WalkStep::forward ? cost.forward : step == WalkStep::input ? cost.input : cost.weight;
    for (const OpRecord& op : meta->ledger()) part += std::max(op.cost.flop, flop_per_byte * (op.cost.read + op.cost.write));
  };
  meta->record(true);
  CallRun all(model.calls(), context, hooks, recompute);
  all.forward();
  ValueGradients grads;
  all.backward(grads, Part::input);
  all.backward_weight();
  return costs;
}

std::vector<int> cut_into_stages(std::span<const CallCost> calls, int stages, const std::string& where) {
  const std::size_t n = calls.size(), parts = static_cast<std::size_t>(stages);
  if (stages < 1 || parts > n)
    fail(Fault::input, where, "the model has " + std::to_string(n) + " calls, too few for " + std::to_string(stages) +
                                  " stages (mesh.pp x mesh.pipeline.stages_per_rank): expected at most " + std::to_string(n));
  std::vector<double> sum(n + 1, 0);
  for (std::size_t i = 0; i < n; ++i) sum[i + 1] = sum[i] + calls[i].total();

  // best[k][i]: the first i calls as k stages. First the least possible maximum, then the least squares below it.
  constexpr double never = std::numeric_limits<double>::infinity();
  std::vector<std::vector<std::size_t>> from(parts + 1, std::vector<std::size_t>(n + 1, 0));
  const auto solve = [&](auto&& join, double most) {
    std::vector<std::vector<double>> best(parts + 1, std::vector<double>(n + 1, never));
    best[0][0] = 0;
    for (std::size_t k = 1; k <= parts; ++k)
      for (std::size_t i = k; i + (parts - k) <= n; ++i)
        for (std::size_t j = k - 1; j < i; ++j) {
          const double stage = sum[i] - sum[j];
          if (best[k - 1][j] == never || stage > most) continue;
          const double value = join(best[k - 1][j], stage);
          if (value < best[k][i]) best[k][i] = value, from[k][i] = j;
        }
    return best[parts][n];
  };
  const double least = solve([](double a, double stage) { return std::max(a, stage); }, never);
  solve([](double a, double stage) { return a + stage * stage; }, least * (1 + 1e-9));
  std::vector<int> stage_of_call(n, 0);
  for (std::size_t k = parts, i = n; k > 0; i = from[k][i], --k)
    for (std::size_t c = from[k][i]; c < i; ++c) stage_of_call[c] = static_cast<int>(k) - 1;
  return stage_of_call;
}

Costs stage_costs(std::span<const CallCost> calls, std::span<const int> stage_of_call) {
  Costs costs;
  const auto stages = static_cast<std::size_t>(stage_of_call.empty() ? 1 : stage_of_call.back() + 1);
  costs.forward.assign(stages, 0), costs.input.assign(stages, 0), costs.weight.assign(stages, 0);
  for (std::size_t c = 0; c < calls.size(); ++c) {
    const auto s = static_cast<std::size_t>(stage_of_call[c]);
    costs.forward[s] += calls[c].forward, costs.input[s] += calls[c].input, costs.weight[s] += calls[c].weight;
  }
  return costs;
}

std::vector<std::vector<std::string>> carried_values(const Model& model, std::span<const int> stage_of_call) {
  const auto& calls = model.calls();
  const auto contains = [](const std::vector<std::string>& names, const std::string& name) { return std::find(names.begin(), names.end(), name) != names.end(); };
  std::vector<std::vector<std::string>> carried(static_cast<std::size_t>(stage_of_call.empty() ? 1 : stage_of_call.back() + 1));
  for (std::size_t cut = 1; cut < calls.size(); ++cut) {
    if (stage_of_call[cut] == stage_of_call[cut - 1]) continue;
    auto& names = carried[static_cast<std::size_t>(stage_of_call[cut - 1])];
    for (std::size_t before = 0; before < cut; ++before)
      for (const std::string& name : calls[before].writes) {
        if (contains(names, name)) continue;
        const auto reads = [&](const Call& call) { return contains(call.reads, name); };
        if (std::any_of(calls.begin() + static_cast<std::ptrdiff_t>(cut), calls.end(), reads)) names.push_back(name);
      }
  }
  return carried;
}

std::vector<TiedParameter> tied_parameters(const Model& model, std::span<const int> stage_of_call) {
  std::vector<TiedParameter> all;
  for (std::size_t c = 0; c < model.calls().size(); ++c)
    for (Parameter* p : model.calls()[c].block->parameters()) {
      auto it = std::find_if(all.begin(), all.end(), [&](const TiedParameter& t) { return t.parameter == p; });
      if (it == all.end()) it = all.insert(it, {p, {}});
      if (it->stages.empty() || it->stages.back() != stage_of_call[c]) it->stages.push_back(stage_of_call[c]);
    }
  all.erase(std::remove_if(all.begin(), all.end(), [](const TiedParameter& t) { return t.stages.size() < 2; }), all.end());
  return all;
}

}  // namespace capstan::pipeline
