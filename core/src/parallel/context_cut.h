// defines: ContextCut, cut_sequences(), cut_context(): which rows of a batch's sequences a context rank holds.
#pragma once
#include <capstan/batch.h>
#include <capstan/export.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace capstan {

/// Each sequence is cut into 2 C chunks of nearly equal length; context rank c of C holds chunks c and 2 C - 1 - c, so that
/// causal attention costs all ranks the same. Local rows: the sequences in order, of each its two chunks.
struct CAPSTAN_API ContextCut {
  struct Chunk {
    int rank = 0;  ///< that holds it
    std::int32_t sequence = 0;
    std::int32_t offset = 0;  ///< its first row's position in the sequence
    std::int32_t local = 0;   ///< its first row on that rank
    std::int32_t whole = 0;   ///< its first row in the whole batch
    std::int32_t length = 0;  ///< at least 1
  };
  int size = 1, rank = 0;
  std::vector<Chunk> chunks;               ///< of all ranks, in the order of the whole batch's rows
  std::vector<std::int32_t> starts;        ///< of the whole sequences, [sequences + 1]
  std::vector<std::int32_t> local_starts;  ///< of this rank's parts of them, [sequences + 1]
  std::int64_t capacity = 0;               ///< local rows, the same on every rank

  /// The whole batch's row behind each of this rank's rows; -1: a row of the dead sequence. [capacity]
  std::vector<std::int32_t> source() const;
};

namespace parallel {

/// Cuts the sequences [starts[s], starts[s + 1]) of a batch of `capacity` rows for context rank `rank` of `size`. The local
/// capacity is a multiple of `tensor_ranks`, and capacity / size where the sequences allow.
CAPSTAN_API std::shared_ptr<const ContextCut> cut_sequences(std::span<const std::int32_t> starts, std::int64_t capacity,
                                                            int size, int rank, int tensor_ranks);

/// What context rank `rank` of `size` gets of `whole` (targets shifted before the cut): its rows of every stream, with the
/// positions and sample_ids that they have in the whole; step_weight stays. Padded for `tensor_ranks`. Itself when
/// size is 1 and nothing is missing.
CAPSTAN_API Batch cut_context(const Batch& whole, int size, int rank, int tensor_ranks);

}  // namespace parallel
}  // namespace capstan
