// defines: CallCost, call_costs(), cut_into_stages(), stage_costs(), Carried, carried_values(), TiedParameter, tied_parameters():
// which calls make a pipeline stage, and what goes between stages.
#pragma once
#include "pipeline/simulate.h"

#include <capstan/export.h>
#include <capstan/model.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace capstan::pipeline {

/// What one call costs on one microbatch, in FLOPs; an op that moves more bytes than it computes counts as those.
struct CallCost {
  double forward = 0, input = 0, weight = 0;
  double total() const { return forward + input + weight; }
};

/// Costs of the model's calls, in their order: one step on a meta device, on which `batch` is, without memory or arithmetic.
/// It places the model's parameters there: give it a model of its own. `recompute`: calls but heads' run again in the
/// backward. `flop_per_byte`: what the machine computes while it moves one byte.
CAPSTAN_API std::vector<CallCost> call_costs(Model& model, const Batch& batch, DType dtype, bool recompute = false, double flop_per_byte = 100);
/// The same for `samples` sequences of `length` tokens.
CAPSTAN_API std::vector<CallCost> call_costs(Model& model, std::int64_t samples, std::int64_t length, DType dtype, bool recompute = false,
                                             double flop_per_byte = 100);

/// The stage of each call: neighbouring calls, at least one a stage, so that the most expensive stage is as cheap as can be,
/// and among such cuts the most even one. Error(input) at `where` when there are more stages than calls.
CAPSTAN_API std::vector<int> cut_into_stages(std::span<const CallCost> calls, int stages, const std::string& where = "stages");

/// For simulate().
CAPSTAN_API Costs stage_costs(std::span<const CallCost> calls, std::span<const int> stage_of_call);

/// Names of the carried values that each stage hands to the next: written before and read after, also by stages further on.
/// One list for each stage; the last one's is empty.
CAPSTAN_API std::vector<std::vector<std::string>> carried_values(const Model& model, std::span<const int> stage_of_call);

/// A parameter that calls of several stages use: each of those stages has a copy, and its gradient is the sum of theirs.
struct TiedParameter { Parameter* parameter = nullptr; std::vector<int> stages; };
CAPSTAN_API std::vector<TiedParameter> tied_parameters(const Model& model, std::span<const int> stage_of_call);

}  // namespace capstan::pipeline
