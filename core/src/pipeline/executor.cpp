// Runs one rank's row of a schedule.
#include "pipeline/executor.h"

#include "model/call_run.h"
#include "pipeline/stages.h"
#include "pipeline/transfers.h"

#include <capstan/error.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace capstan::pipeline {

struct Executor::Shapes {
  std::vector<std::vector<std::string>> names;     // per stage: what it hands to the next
  std::vector<std::pair<std::size_t, std::size_t>> calls;  // per stage: [begin, end)
  KnownShapes known;
};

/// One table being run: what is alive between actions.
struct Executor::Step {
  using Names = std::vector<std::string>;
  using Place = std::pair<int, int>;  // stage, microbatch

  /// A stage of a microbatch between its forward and the end of its backward.
  struct Visit {
    std::optional<CallRun> calls;
    std::vector<Tensor> outputs;          // until they are sent or taken by a stage on this rank
    std::vector<ValueShape> read, wrote;  // of carried values in and out
    std::vector<Tensor> gradients;        // of what it read, until they are sent or taken
  };

  Executor& self;
  const Schedule& table;
  std::span<ForwardContext* const> contexts;
  const WalkHooks& hooks;
  std::vector<int> rank_of;
  Transfers transfers;
  std::map<Place, Visit> visits;
  std::map<Place, std::shared_ptr<Packet>> values_in, gradients_in;
  std::map<Place, std::vector<Tensor>> handed, handed_back;  // between stages of one rank

  Step(Executor& e, const Schedule& t, std::span<ForwardContext* const> c, const WalkHooks& h)
      : self(e), table(t), contexts(c), hooks(h), rank_of(rank_of_stage(t)), transfers(e.pp_, e.options_.hosts != nullptr ? *e.options_.hosts : e.pp_, c[0]->device, e.shapes_->known) {}

  ForwardContext& context(int m) const { return *contexts[static_cast<std::size_t>(m)]; }
  const Names& names(int stage) const { return self.shapes_->names[static_cast<std::size_t>(stage)]; }
  int rank(int stage) const { return rank_of[static_cast<std::size_t>(stage)]; }
  bool here(int stage) const { return rank(stage) == self.pp_.rank(); }
  std::span<const Call> calls(int stage) const {
    const auto [begin, end] = self.shapes_->calls[static_cast<std::size_t>(stage)];
    return std::span<const Call>(self.model_.calls()).subspan(begin, end - begin);
  }

  void act(const Action& a) {
    switch (a.kind) {
      case ActionKind::forward: return forward(a.stage, a.microbatch);
      case ActionKind::backward: return backward(a.stage, a.microbatch, Part::both);
      case ActionKind::input: return backward(a.stage, a.microbatch, Part::input);
      case ActionKind::weight: return weight(a.stage, a.microbatch);
      case ActionKind::send_forward: {
        std::vector<Tensor> values = std::exchange(visits.at({a.stage, a.microbatch}).outputs, {});
        transfers.send_values(rank(a.stage + 1), a.stage, geometry(context(a.microbatch)), names(a.stage), values);
        if (!table.backward) visits.erase({a.stage, a.microbatch});
        return;
      }
      case ActionKind::receive_forward:
        values_in[{a.stage, a.microbatch}] =
            transfers.receive_values(rank(a.stage - 1), a.stage - 1, geometry(context(a.microbatch)), names(a.stage - 1).size());
        return;
      case ActionKind::send_backward:
        transfers.send_gradients(rank(a.stage - 1), std::exchange(visits[{a.stage, a.microbatch}].gradients, {}));
        forget(a.stage, a.microbatch);
        return;
      case ActionKind::receive_backward:
        gradients_in[{a.stage, a.microbatch}] = transfers.receive_gradients(rank(a.stage + 1), visits.at({a.stage, a.microbatch}).wrote);
        return;
    }
  }

  std::vector<Tensor> take(std::map<Place, std::shared_ptr<Packet>>& packets, std::map<Place, std::vector<Tensor>>& local, Place place, int other) {
    if (here(other)) return std::move(local.extract(place).mapped());
    const std::shared_ptr<Packet> packet = packets.extract(place).mapped();
    transfers.wait(rank(other), *packet);
    return std::move(packet->values);
  }

  void forward(int s, int m) {
    ForwardContext& c = context(m);
    Visit& visit = visits[{s, m}];
    if (s > 0) {
      const std::vector<Tensor> values = take(values_in, handed, {s, m}, s - 1);
      for (std::size_t i = 0; i < values.size(); ++i) {
        visit.read.push_back(shape_of(values[i]));
        if (values[i].defined()) c.set(names(s - 1)[i], values[i]);
      }
    }
    if (table.backward) {
      visit.calls.emplace(calls(s), c, hooks, self.options_.recompute);
      visit.calls->forward();
    } else {
      for (const Call& call : calls(s)) {
        if (hooks.before) hooks.before(call, WalkStep::forward);
        call.block->forward(c);
        if (hooks.after) hooks.after(call, WalkStep::forward);
      }
    }
    for (const std::string& name : names(s)) {
      visit.outputs.push_back(c.has(name) ? c.get(name).detach() : Tensor());
      visit.wrote.push_back(shape_of(visit.outputs.back()));
    }
    // The context may carry this microbatch through other stages of this rank, and need not hold what is on its way.
    if (s > 0)
      for (const std::string& name : names(s - 1)) c.drop(name);
    for (const Call& call : calls(s))
      for (const std::string& name : call.writes) c.drop(name);
    const bool last = s + 1 == table.stages;
    if (!last && here(s + 1)) handed[{s + 1, m}] = std::exchange(visit.outputs, {});
    if (!table.backward && (last || here(s + 1))) visits.erase({s, m});
  }

  void backward(int s, int m, Part part) {
    Visit& visit = visits.at({s, m});
    ValueGradients grads;
    if (s + 1 < table.stages) {
      std::vector<Tensor> incoming = take(gradients_in, handed_back, {s, m}, s + 1);
      for (std::size_t i = 0; i < incoming.size(); ++i)
        if (incoming[i].defined()) grads[names(s)[i]] = std::move(incoming[i]);
    }
    visit.calls->backward(grads, part);
    if (s > 0)
      for (const std::string& name : names(s - 1)) context(m).drop(name);  // a recomputed call had it put back
    if (s > 0) {
      for (std::size_t i = 0; i < visit.read.size(); ++i) {
        Tensor& gradient = visit.gradients.emplace_back();
        const ValueShape& shape = visit.read[i];
        if (!shape.has_gradient()) continue;
        const auto it = grads.find(names(s - 1)[i]);
        // What nothing depended on has none: the other side expects zeros.
        gradient = it == grads.end() ? Tensor::zeros(shape.dims, shape.dtype, context(m).device) : it->second.to(shape.dtype);
      }
      if (here(s - 1)) handed_back[{s - 1, m}] = std::exchange(visit.gradients, {});
    }
    if (part == Part::both) visit.calls.reset();
    forget(s, m);
  }

  void weight(int s, int m) {
    Visit& visit = visits.at({s, m});
    visit.calls->backward_weight();
    visit.calls.reset();
    forget(s, m);
  }

  /// A visit ends when its backward is done and its gradients are on their way.
  void forget(int s, int m) {
    const auto it = visits.find({s, m});
    if (it != visits.end() && !it->second.calls && it->second.gradients.empty()) visits.erase(it);
  }

  static ValueShape shape_of(const Tensor& t) { return t.defined() ? ValueShape{true, t.dtype(), t.shape()} : ValueShape{}; }
};

Executor::~Executor() = default;

Executor::Executor(Model& model, Communicator& pp, Plan plan, std::vector<int> stage_of_call, ExecutorOptions options)
    : model_(model), pp_(pp), plan_(plan), stage_of_call_(std::move(stage_of_call)), options_(std::move(options)), shapes_(std::make_unique<Shapes>()) {
  if (pp_.size() != plan_.ranks)
    fail(Fault::programming, "pipeline", "the plan is for " + std::to_string(plan_.ranks) + " ranks, the communicator " + pp_.name() + " has " + std::to_string(pp_.size()));
  if (stage_of_call_.size() != model_.calls().size())
    fail(Fault::programming, "pipeline", "expected a stage for each of " + std::to_string(model_.calls().size()) + " calls, got " + std::to_string(stage_of_call_.size()));
  for (std::size_t c = 0; c < stage_of_call_.size(); ++c) {
    const int before = c == 0 ? -1 : stage_of_call_[c - 1], stage = stage_of_call_[c];
    if (stage != before && stage != before + 1)
      fail(Fault::programming, "pipeline", "stages are neighbouring calls in order: call " + std::to_string(c) + " is in stage " + std::to_string(stage) +
                                               ", the one before in " + std::to_string(before));
    if (stage != before) shapes_->calls.emplace_back(c, c);
    shapes_->calls.back().second = c + 1;
  }
  if (static_cast<int>(shapes_->calls.size()) != plan_.stages())
    fail(Fault::programming, "pipeline", "expected " + std::to_string(plan_.stages()) + " stages, got " + std::to_string(shapes_->calls.size()));
  shapes_->names = carried_values(model_, stage_of_call_);
}

const Schedule& Executor::schedule(int microbatches) {
  const auto it = tables_.find(microbatches);
  if (it != tables_.end()) return it->second;
  Schedule table = make_schedule(plan_, microbatches);
  validate(table);
  return tables_.emplace(microbatches, std::move(table)).first->second;
}

std::vector<LossEntry> Executor::run(std::span<ForwardContext* const> contexts, const WalkHooks& hooks) {
  return run_table(schedule(static_cast<int>(contexts.size())), contexts, hooks);
}

std::vector<LossEntry> Executor::run(const Schedule& table, std::span<ForwardContext* const> contexts, const WalkHooks& hooks) {
  validate(table);
  const std::vector<int> places = rank_of_stage(table);
  for (int s = 0; s < table.stages; ++s)
    if (table.ranks != plan_.ranks || table.stages != plan_.stages() || places[static_cast<std::size_t>(s)] != s % plan_.ranks)
      fail(Fault::input, "pipeline schedule " + table.name, "expected " + std::to_string(plan_.stages()) + " stages over " + std::to_string(plan_.ranks) +
                                                                " ranks, stage s on rank s mod " + std::to_string(plan_.ranks));
  return run_table(table, contexts, hooks);
}

std::vector<LossEntry> Executor::evaluate(std::span<ForwardContext* const> contexts, const WalkHooks& hooks) {
  const int n = static_cast<int>(contexts.size());
  auto it = forward_tables_.find(n);
  if (it == forward_tables_.end()) {
    it = forward_tables_.emplace(n, make_forward_schedule(plan_, n)).first;
    validate(it->second);
  }
  return run_table(it->second, contexts, hooks);
}

std::vector<LossEntry> Executor::run_table(const Schedule& table, std::span<ForwardContext* const> contexts, const WalkHooks& hooks) {
  if (static_cast<int>(contexts.size()) != table.microbatches)
    fail(Fault::programming, "pipeline", "the schedule has " + std::to_string(table.microbatches) + " microbatches, got " + std::to_string(contexts.size()));
  for (const ForwardContext* c : contexts)
    if (c->grad != table.backward) fail(Fault::programming, "pipeline", table.backward ? "contexts need grad for a backward" : "an evaluation records no graph: contexts have grad set");
  if (step_) fail(Fault::programming, "pipeline", "an earlier step failed");
  step_ = std::make_unique<Step>(*this, table, contexts, hooks);
  for (const Action& a : table.rows[static_cast<std::size_t>(pp_.rank())]) {
    if (options_.doing) options_.doing(a);
    step_->transfers.progress();
    step_->act(a);
  }
  step_->transfers.finish();
  step_.reset();
  std::vector<LossEntry> losses;
  for (const ForwardContext* c : contexts) losses.insert(losses.end(), c->losses().begin(), c->losses().end());
  return losses;
}

}  // namespace capstan::pipeline
