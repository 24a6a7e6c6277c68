// defines: Space, Batch: ragged batches. Token streams over token spaces with positions and starts; a
// rectangle B x L is B equal sequences; packed documents and an engine's mixed prefill and decode are the
// same thing. Activations are [T, hidden].
#pragma once
#include <capstan/tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capstan {

struct ContextCut;

/// One token space. Row t of its streams belongs to sequence s with starts[s] <= t < starts[s + 1].
/// Rows past starts.back() up to `capacity` belong to a dead sequence: they carry weight 0.
struct CAPSTAN_API Space {
  std::string name = "text";
  Tensor starts;                          ///< i32 [sequences + 1] on the device
  Tensor positions;                       ///< i32 [capacity], position within the sequence
  Tensor sample_ids;                      ///< i64 [capacity], global token address for randomness
  std::vector<std::int32_t> host_starts;  ///< `starts`, on the host
  std::vector<std::int32_t> past;         ///< per sequence: tokens that the sequence state already holds
  std::int64_t capacity = 0;              ///< rows of every stream
  std::int64_t longest = 0;               ///< capacity of one sequence, past included
  /// Not null: these rows are this rank's chunks of sequences that the context axis shares, positions and sample_ids
  /// being those of the whole sequences; what looks across rows must know that (nn::attention does).
  std::shared_ptr<const ContextCut> cut;
  /// The work on this batch is recorded and will run again with other contents of the same capacities: host_starts are
  /// those of one of them, and only `starts` tells where sequences begin.
  bool recorded = false;
  std::int64_t sequences() const { return static_cast<std::int64_t>(host_starts.size()) - 1; }
  std::int64_t used() const { return host_starts.empty() ? 0 : host_starts.back(); }
};

class CAPSTAN_API Batch {
 public:
  std::vector<Space> spaces;
  const Space& space(std::string_view name = "text") const;
  /// A named stream ("tokens" i32 [T], "targets" i32 [T], "weight" f32 [T]); Error(programming) if absent.
  const Tensor& stream(std::string_view name) const;
  bool has(std::string_view name) const;
  void set(std::string name, Tensor value);
  const std::vector<std::pair<std::string, Tensor>>& streams() const { return streams_; }
  /// Sum of "weight" over the whole optimizer step's microbatches and ranks: the loss's normalizer.
  double step_weight = 0;
  /// Sum of "weight" over this batch's rows; negative where only the stream knows.
  double own_weight = -1;

 private:
  std::vector<std::pair<std::string, Tensor>> streams_;
};

/// A batch of `tokens` cut into sequences of `lengths`, with targets and weights when given. Positions
/// restart in each sequence. `first_token_id` addresses row 0 for dropout; rows follow on.
CAPSTAN_API Batch make_batch(Device& device, std::span<const std::int32_t> tokens, std::span<const std::int32_t> lengths,
                             std::span<const std::int32_t> targets = {}, std::span<const float> weight = {},
                             std::int64_t first_token_id = 0);

}  // namespace capstan
