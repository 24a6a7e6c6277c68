// defines: Optimizer, UpdateItem, StateDecl.
#pragma once
#include <capstan/parameter.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace capstan {

/// What a rule must see whole to update it: any element on its own, a row, a block of rows, or a tensor.
enum class Atomicity : std::uint8_t { element, row, block, tensor };

/// One state tensor that a rule keeps for a parameter ("m", "v"), of the parameter's shape.
struct StateDecl { std::string name; DType dtype = DType::f32; };

/// One parameter's part of an update, all local shards of the same shape. `value` is the master copy.
struct UpdateItem {
  const Parameter* parameter = nullptr;
  Tensor value;                 ///< f32 (f64 in f64 models), updated in place
  Tensor grad;                  ///< same dtype as value
  std::vector<Tensor> state;    ///< as state_of() declared, zero at step 0
};

struct UpdateContext {
  Device* device = nullptr;
  std::int64_t step = 0;        ///< from 1
  double lr_scale = 1;          ///< the schedule's factor on the rule's own peak learning rate
  double grad_scale = 1;        ///< multiply gradients by this (clipping)
};

/// True for parameters that weight decay applies to: by their axes and role, never by name. Matrices,
/// embeddings, heads, routers and convolutions decay; vectors, biases and states do not.
CAPSTAN_API bool decays(const Parameter& parameter);

/// True for hidden matrices: role matrix and rank 2 or more (Muon's domain).
CAPSTAN_API bool is_hidden_matrix(const Parameter& parameter);

/// Interface of plugin kind "optimizer".
class CAPSTAN_API Optimizer {
 public:
  virtual ~Optimizer();
  virtual std::vector<StateDecl> state_of(const Parameter& parameter) const = 0;
  virtual Atomicity atomicity(const Parameter& parameter) const = 0;
  /// The peak learning rate, for display and the schedule.
  virtual double peak_lr() const = 0;
  virtual void update(const UpdateContext& context, std::span<UpdateItem> items) = 0;
  /// True when values and states change through update.h alone: an update can then be asked of a GPU before the host knows
  /// whether the gradient is finite, for those functions leave everything as it is when it is not.
  virtual bool gated() const { return false; }
};

}  // namespace capstan
