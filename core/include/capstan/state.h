// defines: StateSpec, SequenceState: how mixers reach their past. Absent in training; paged KV (or a
// recurrent slot) in inference.
#pragma once
#include <capstan/tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

/// What a block keeps for each token (paged) or each sequence (slot).
struct StateSpec {
  enum class Kind : std::uint8_t { paged, slot, window } kind = Kind::paged;
  std::string name;   ///< unique within the model, "layers.3.attention"
  Dims shape;         ///< per token or per sequence: [kv_heads, head_size] for K and again for V
};

/// Paged keys and values of one layer. Token t of sequence s is in page blocks[s][t / page], row t % page.
struct PagedKV {
  Tensor k, v;          ///< [pages, kv_heads, page, head_size]
  Tensor blocks;        ///< i32 [sequences, most pages of one]
  Tensor lengths;       ///< i32 [sequences], tokens held, this forward's included
  std::int64_t page = 0;
};

/// Sequences of one forward are those of the batch's space, in order.
class CAPSTAN_API SequenceState {
 public:
  virtual ~SequenceState();
  /// Stores this forward's keys and values [T, kv_heads, head_size] and returns the whole past with them.
  virtual PagedKV append(std::string_view name, const Tensor& k, const Tensor& v) = 0;
  /// The recurrent state of the batch's sequences, [sequences, ...spec.shape]; written in place.
  virtual Tensor slot(std::string_view name) = 0;
  /// Forgets what sequence `id` holds past `length` tokens (rejected speculation).
  virtual void truncate(std::int64_t id, std::int64_t length) = 0;
  /// Marks the first `length` tokens of a sequence as final.
  virtual void commit(std::int64_t id, std::int64_t length) = 0;
  /// A new sequence that shares the past of `id`; pages are copied on write. Returns its id.
  virtual std::int64_t fork(std::int64_t id) = 0;
  /// The version of the weights that made the state of a sequence.
  virtual std::uint64_t weights_version(std::int64_t id) const = 0;
};

}  // namespace capstan
