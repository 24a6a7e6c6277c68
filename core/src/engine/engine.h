// defines: Engine: owns a model's parameters, gradients and optimizer state in flat units, one for each
// call's block, and runs the optimizer over them.
#pragma once
#include <capstan/checkpoint.h>
#include <capstan/export.h>
#include <capstan/model.h>
#include <capstan/optimizer.h>
#include <capstan/walk.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace capstan {

struct EngineOptions {
  DType compute = DType::f32;   ///< of working copies and activations
  std::uint64_t seed = 1;
  bool gradients = true;        ///< false for inference: weights alone
  bool recompute = false;       ///< keep only the inputs of blocks, run them again in the backward
};

/// What a tensor of the run looks like to a checkpoint: a named view of memory.
struct NamedTensor { std::string name; Tensor value; };

/// Flat buffers of one unit. Masters are f32 (f64 in f64 runs); with bf16 compute the working copy is apart.
class CAPSTAN_API Engine {
 public:
  /// Places every parameter on `device` without values: call initialize() or load into tensors().
  Engine(std::shared_ptr<Model> model, std::shared_ptr<Device> device, EngineOptions options);
  ~Engine();

  Model& model() const { return *model_; }
  Device& device() const { return *device_; }
  const EngineOptions& options() const { return options_; }
  std::int64_t parameters() const { return parameter_count_; }

  /// Initial values by addressed randomness: the same bits on every mesh.
  void initialize();
  /// Copies masters into the working copies after they changed from outside.
  void publish();

  /// Makes the optimizer's state, zeroed.
  void attach(std::shared_ptr<Optimizer> optimizer);

  /// One microbatch; gradients add up until update() or discard().
  std::vector<LossEntry> forward_backward(const Batch& batch, std::uint64_t step);
  /// The losses of a batch without gradients; sums are divided by the batch's step_weight.
  std::vector<LossEntry> evaluate(const Batch& batch);

  /// Norm of the whole gradient, in f64; not finite when any element is not.
  double gradient_norm();
  /// The first parameter whose gradient has an element that is not finite; "" when there is none.
  std::string first_nonfinite_gradient() const;
  /// One optimizer step; `clip` > 0 scales the gradient to at most that norm.
  void update(std::int64_t step, double lr_scale, double norm, double clip);
  /// Forgets the gradients.
  void discard();

  /// Everything a checkpoint holds: "model/<parameter>" and "optimizer/<state>/<parameter>".
  std::vector<NamedTensor> tensors(bool with_optimizer) const;

 private:
  struct State;
  struct Unit;
  ForwardContext context(const Batch& batch) const;
  void clear_unused_gradients();
  std::shared_ptr<Model> model_;
  std::shared_ptr<Device> device_;
  EngineOptions options_;
  std::shared_ptr<Optimizer> optimizer_;
  std::vector<std::unique_ptr<Unit>> units_;
  std::int64_t parameter_count_ = 0;
};

}  // namespace capstan
