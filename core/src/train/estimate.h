// defines: Estimate: what a step costs, found by running it on the meta device.
#pragma once
#include "train/session.h"

#include <capstan/export.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

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
  std::int64_t validation_bytes = 0;  ///< all batches of a validation, and the larger of a forward's room and the bigram model; between steps
  /// Most at once: samples and validations come while there are no activations.
  std::int64_t total_bytes() const {
    return weights_bytes + quantized_bytes + std::max({activations_bytes, sampling_bytes, validation_bytes}) + staging_bytes;
  }
};

/// What a validation holds beside the forward of one of its microbatches.
struct Validation {
  std::int64_t microbatches = 0;  ///< of all ranks, made at once; 0: there is no validation
  std::int64_t samples = 0;       ///< of each
  std::int64_t bigram_bytes = 0;  ///< of the bigram model, on the first rank's host: its counts and the tokens that it scores
};
CAPSTAN_API Validation validation_of(const Session& session, std::int64_t micro_batch);

/// Whether checkpoints are written from a copy in memory.
CAPSTAN_API bool saves_from_a_copy(const Options& options);
/// Tokens whose keys and values the inference engine of train.sample_every has room for; 0 when there are no samples.
CAPSTAN_API std::int64_t sampled_tokens(const Session& session);
/// Bytes of keys and values of one token.
CAPSTAN_API std::int64_t state_bytes_per_token(const Model& model, DType compute);

/// "2.1 GiB: 1.9 GiB weights, gradients and optimizer, 196 MiB activations, ..."; `shared`: among ranks, as the estimate does not know.
CAPSTAN_API std::string describe_memory(const Estimate& estimate, bool shared);
/// Error(input) when the weights alone are more than this host's memory and swap space; `warn` hears of it when all is.
CAPSTAN_API void check_memory(const Session& session, const Estimate& estimate, const std::function<void(const std::string&)>& warn);

/// Runs one microbatch of the recipe's shapes on the meta device. No memory, no arithmetic: the same code.
CAPSTAN_API Estimate estimate_step(const Session& session);

}  // namespace capstan::train
