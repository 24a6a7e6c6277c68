// defines: Executor, ExecutorOptions: runs one rank's row of a pipeline schedule.
#pragma once
#include "comm/communicator.h"
#include "pipeline/schedule.h"

#include <capstan/export.h>
#include <capstan/walk.h>

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

namespace capstan::pipeline {

struct ExecutorOptions {
  bool recompute = false;                     ///< as forward_backward()'s recompute_all
  /// Carries the shapes of values where `pp` moves memory of a GPU: the same ranks over their hosts. Null: `pp` does.
  Communicator* hosts = nullptr;
  std::function<void(const Action&)> doing{}; ///< told of each action before it runs: for the watchdog and for traces
};

/// The stages of one pipeline rank. Each stage is a run of the model's calls and goes through the same walk as a model in one
/// piece; carried values and their gradients travel between ranks. Shapes of a batch's values are sent ahead once for each
/// geometry of a batch. All ranks of `pp` call the same members with the same microbatches.
class CAPSTAN_API Executor {
 public:
  /// `pp`: rank r of it holds the stages r, r + ranks, ...; nobody else uses this communicator. `stage_of_call`: see
  /// cut_into_stages(). Error(programming) when these do not go together.
  Executor(Model& model, Communicator& pp, Plan plan, std::vector<int> stage_of_call, ExecutorOptions options = {});
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  /// A step's microbatches, forward and backward: gradients of this rank's parameters end in their leaves. contexts[m] is
  /// microbatch m's, with `grad` set. Hooks hear of this rank's calls. Returns the losses of this rank's stages, microbatch
  /// by microbatch: those of all ranks together are the step's. Error(runtime) when another rank fails; after an error the
  /// executor is of no use.
  std::vector<LossEntry> run(std::span<ForwardContext* const> contexts, const WalkHooks& hooks = {});
  /// The same with a table of one's own, over the same stages. Error(input) when it is not valid.
  std::vector<LossEntry> run(const Schedule& table, std::span<ForwardContext* const> contexts, const WalkHooks& hooks = {});
  /// Forwards alone, without a graph, heads included.
  std::vector<LossEntry> evaluate(std::span<ForwardContext* const> contexts, const WalkHooks& hooks = {});

  /// The table that run() takes for so many microbatches.
  const Schedule& schedule(int microbatches);
  const std::vector<int>& stage_of_call() const { return stage_of_call_; }

 private:
  struct Step;
  struct Shapes;
  std::vector<LossEntry> run_table(const Schedule& table, std::span<ForwardContext* const> contexts, const WalkHooks& hooks);

  Model& model_;
  Communicator& pp_;
  Plan plan_;
  std::vector<int> stage_of_call_;
  ExecutorOptions options_;
  std::map<int, Schedule> tables_, forward_tables_;  // by microbatches
  std::unique_ptr<Shapes> shapes_;
  std::unique_ptr<Step> step_;  // kept when it fails: its transfers may still be under way
};

}  // namespace capstan::pipeline
