// defines: Engine: owns a model's parameters, gradients and optimizer state in flat units, one for each
// call's block, whole or in pieces over the mesh, and runs the optimizer over them.
#pragma once
#include "engine/pool.h"
#include "engine/sharding.h"
#include "engine/step_queue.h"
#include "engine/unit.h"
#include "mesh/mesh.h"
#include "pipeline/executor.h"

#include <capstan/checkpoint.h>
#include <capstan/export.h>
#include <capstan/model.h>
#include <capstan/optimizer.h>
#include <capstan/walk.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan {

/// Of the weights that an optimizer changes and checkpoints hold.
inline DType master_type(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

struct EngineOptions {
  DType compute = DType::f32;   ///< of working copies and activations
  LinearPrecision linear{};     ///< of linear layers' products
  std::uint64_t seed = 1;
  bool gradients = true;        ///< false for inference: working copies alone, which stand for the masters
  bool recompute = false;       ///< keep only the inputs of blocks, run them again in the backward
  Sharding sharding = Sharding::of(Strategy::fsdp);  ///< over shard x context; one rank keeps all, whatever it says
  bool reshard_after_forward = true;  ///< parameters in pieces: dropped after a call's forward, gathered again for its backward
  bool prefetch = true;               ///< gather the next call's parameters while one computes
  DType reduce = DType::f32;          ///< gradients are sent in; bf16 halves what is sent, sums stay f32
  pipeline::Plan pipeline{};          ///< with pp > 1
  std::vector<int> stage_of_call{};   ///< with pp > 1: the stage of each of the model's calls
  Recording recording = Recording::off;  ///< of queued steps
};

/// What a tensor of the run looks like to a checkpoint: a box of a named global tensor, in memory.
struct NamedTensor {
  std::string name;
  Tensor value;                      ///< contiguous, of the box's extents
  std::vector<std::int64_t> shape;   ///< global
  std::vector<std::int64_t> begin;   ///< of the box
};

/// Memory of the engine by what it is for, in bytes on this rank.
struct EngineMemory {
  std::int64_t masters = 0, gradients = 0, optimizer = 0, working = 0, gather_pool = 0, gradient_pool = 0;
  std::int64_t total() const { return masters + gradients + optimizer + working + gather_pool + gradient_pool; }
};

/// Flat buffers of units. Masters are f32 (f64 in f64 runs); with bf16 compute the working copy is apart. Without gradients there
/// are no masters: what they would give is held in `compute`, tensors() included.
/// Every member that says "all ranks" is a collective of the mesh.
class CAPSTAN_API Engine {
 public:
  /// Places every parameter on `device` without values: call initialize() or load into tensors(). `mesh` null: one rank.
  Engine(std::shared_ptr<Model> model, std::shared_ptr<Device> device, EngineOptions options, std::shared_ptr<Mesh> mesh = nullptr);
  ~Engine();

  Model& model() const { return *model_; }
  Device& device() const { return *device_; }
  const EngineOptions& options() const { return options_; }
  const std::shared_ptr<Mesh>& mesh() const { return mesh_; }
  std::int64_t parameters() const { return parameter_count_; }  ///< of the whole model
  EngineMemory memory() const;

  /// Initial values by addressed randomness: the same bits on every mesh. All ranks.
  void initialize();
  /// Brings the masters into the working copies after they changed from outside. All ranks.
  void publish();

  /// Makes the optimizer's state, zeroed.
  void attach(std::shared_ptr<Optimizer> optimizer);

  /// One microbatch, or all of a step's; gradients add up until update() or discard(). Of all of a step's the last one's backward
  /// runs beside the sums over ranks. The losses are this rank's part: those of all ranks add up. All ranks.
  std::vector<LossEntry> forward_backward(const Batch& batch, std::uint64_t step);
  std::vector<LossEntry> forward_backward(std::span<const Batch> batches, std::uint64_t step);
  /// The losses of a batch without gradients; sums are divided by the batch's step_weight. All ranks.
  std::vector<LossEntry> evaluate(const Batch& batch);
  std::vector<LossEntry> evaluate(std::span<const Batch> batches);

  /// Norm of the whole gradient, in f64; not finite when any element is not. All ranks get the same bits.
  double gradient_norm();
  /// The first parameter whose gradient has an element that is not finite; "" when there is none. All ranks.
  std::string first_nonfinite_gradient();
  /// One optimizer step; `clip` > 0 scales the gradient to at most that norm. All ranks.
  void update(std::int64_t step, double lr_scale, double norm, double clip);
  /// Why steps cannot be queued here: queue_step() is for GPUs, with an optimizer that obeys a gate. "" when they can.
  std::string cannot_queue() const;
  /// Why queued steps cannot be recorded; "" when they can. Those of several ranks can over NCCL, but for the update.
  std::string cannot_record() const;
  /// A whole step, forward to update, that the host does not wait for. A gradient that is not finite on any rank leaves the
  /// weights, and shuts the way for the steps behind it until reopen(). All ranks, and so are collect() and reopen().
  QueuedStep queue_step(std::span<const Batch> batches, std::int64_t step, double lr_scale, double clip);
  /// Waits for that step alone. In order.
  StepNumbers collect(const QueuedStep& step);
  void reopen();
  /// Null before the first queued step.
  StepQueue* queued() const { return queue_.get(); }

  /// Compares what ranks should hold alike by a fingerprint of each parameter: "" or which parameter differs on which ranks
  /// (of two that differ both, else the few). All ranks get the same text.
  std::string disagreement();
  /// Forgets the gradients.
  void discard();
  /// The whole reduced gradient of a parameter, global shape, for tests and tools. All ranks; after gradient_norm().
  Tensor whole_gradient(const Parameter& parameter);
  /// Runs `work` on rank 0 with the whole model in its memory and no mesh about it, for a look at the model (a sample): the
  /// others send what they hold and wait. Nothing is gathered when every rank has all of it anyway. All ranks.
  void on_whole_model(const std::function<void()>& work);
  /// The whole value of a parameter's master, likewise.
  Tensor whole_value(const Parameter& parameter);

  /// Everything a checkpoint holds: "model/<parameter>" and "optimizer/<state>/<parameter>". `mine`: only what this rank
  /// writes, so that all ranks together write each element once; else all that it holds.
  std::vector<NamedTensor> tensors(bool with_optimizer, bool mine = false) const;
  /// The names of all of it, wherever it is held.
  std::vector<std::string> names(bool with_optimizer) const;

 private:
  friend class StepQueue;
  struct Reducing;
  struct Summing;
  std::vector<LossEntry> walk(const Batch& batch, std::uint64_t step, bool last);
  std::vector<LossEntry> walk_all(std::span<const Batch> batches, std::uint64_t step, bool whole_step);
  std::vector<LossEntry> forward_backward_of(std::span<const Batch> batches, std::uint64_t step, bool whole_step);
  std::vector<kernels::Piece> gradient_pieces();
  /// update() but for forgetting the gradients.
  void apply(std::int64_t step, double lr_scale, double grad_scale);
  ForwardContext context(const Batch& batch) const;
  Batch localize(const Batch& batch) const;
  void make_units();
  WalkHooks hooks();
  template <class Walk>
  std::vector<LossEntry> on_stages(std::span<const Batch> batches, Walk&& walk);
  bool here(std::size_t call) const;
  Communicator& comm(std::string_view axes, std::string_view lane) const;  ///< of the device's memory
  Communicator& host(std::string_view axes, std::string_view lane) const;
  bool in_pieces() const { return pieces_ > 1; }
  std::shared_ptr<void> memory_for(std::int64_t bytes, std::string_view lane, bool pieces, bool replicas);
  void make_pool(std::optional<Pool>& pool, std::int64_t bytes, std::string_view lane);
  void place(Unit& unit, std::size_t parameter);
  void set_runtime();
  bool narrow_messages() const { return options_.reduce == DType::bf16 && options_.compute != DType::f64; }
  std::size_t index_of(const Call& call) const;
  void before(const Call& call, WalkStep::Kind step);
  void after(const Call& call, WalkStep::Kind step);
  bool gather(std::size_t u, bool must);
  void wait_gathered(std::size_t u);
  void drop(std::size_t u);
  void bind_gradient(std::size_t u);
  void add_replicas(Unit& unit);
  void start_reduce(std::size_t u, bool last);
  void settle_oldest();
  bool adds_narrow_itself() const;
  void add_narrow(const void* received, const Tensor& sum);
  void clear_unused(Unit& unit);
  bool replicas() const { return mesh_ && mesh_->size("replicate") > 1; }
  void expect_walks(std::int64_t microbatches);
  void start_sum(std::size_t u);
  void end_pieces(Summing& sum);
  void start_replicas(Summing& sum);
  void end_sums();
  void finish_gradients();
  /// Waits, on the device, for the reductions and sums under way.
  void settle();
  /// Of the units, between walks, after settle().
  std::vector<GradientState> gradient_states() const;
  /// Forgets a walk that did not end, or did not run.
  void abandon_walk(const std::vector<GradientState>& states);
  bool whole_rule(const Unit& unit, std::size_t parameter) const;
  void update_whole(UpdateContext& u, Unit& unit);
  Tensor assemble(const Unit& unit, std::size_t parameter, const Tensor& flat) const;

  std::shared_ptr<Model> model_;
  std::shared_ptr<Device> device_;
  EngineOptions options_;
  std::shared_ptr<Mesh> mesh_;
  std::shared_ptr<Optimizer> optimizer_;
  std::vector<std::unique_ptr<Unit>> units_;
  std::vector<std::vector<std::size_t>> call_units_;  // per call: the units whose parameters it uses
  std::int64_t parameter_count_ = 0;
  int pieces_ = 1, piece_rank_ = 0, tensor_ = 1, pp_ = 1, pp_rank_ = 0;
  bool finished_ = true;     // gradients are reduced
  bool walking_back_ = false;  // a forward whose backward follows
  std::optional<Pool> gather_pool_, gradient_pool_;
  struct Gathered { std::optional<std::int64_t> at; Handle handle; bool pending = false; };
  std::vector<Gathered> gathered_;                   // per unit
  struct Gradient {
    std::optional<std::int64_t> at;  // of the whole one
    GradientState state;
    std::int64_t uses_left = 0;      // backwards of calls until it is the step's; 0: nobody knows
  };
  std::vector<Gradient> gradient_;                   // per unit
  std::vector<std::unique_ptr<Reducing>> reducing_;  // oldest first
  std::vector<std::unique_ptr<Summing>> summing_;    // likewise
  std::unique_ptr<pipeline::Executor> executor_;
  std::unique_ptr<StepQueue> queue_;
};

}  // namespace capstan
