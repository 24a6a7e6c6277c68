// defines: Estimate: what a step costs, found by running it on the meta device.
#pragma once
#include "train/session.h"

#include <capstan/export.h>

#include <cstdint>

namespace capstan::train {

struct Estimate {
  std::int64_t parameters = 0;
  double step_flop = 0;             ///< forward and backward of all microbatches, as run (causal attention counted once)
  double fp8_flop = 0;              ///< of those, the products of precision.linear
  double model_flop_per_token = 0;  ///< the same without recomputation, per token
  std::int64_t weights_bytes = 0;   ///< parameters, gradients, optimizer state and working copies
  std::int64_t quantized_bytes = 0; ///< of these weights in fp8, straight and turned over
  std::int64_t activations_bytes = 0;  ///< most that a microbatch holds beside them
  std::int64_t staging_bytes = 0;   ///< the copy that a checkpoint is written from while training goes on
  std::int64_t sampling_bytes = 0;  ///< keys and values that samples have room for; between steps
};

/// Whether checkpoints are written from a copy in memory.
CAPSTAN_API bool saves_from_a_copy(const Options& options);
/// Tokens whose keys and values the inference engine of train.sample_every has room for; 0 when there are no samples.
CAPSTAN_API std::int64_t sampled_tokens(const Session& session);
/// Bytes of keys and values of one token.
CAPSTAN_API std::int64_t state_bytes_per_token(const Model& model, DType compute);

/// Runs one microbatch of the recipe's shapes on the meta device. No memory, no arithmetic: the same code.
CAPSTAN_API Estimate estimate_step(const Session& session);

}  // namespace capstan::train
