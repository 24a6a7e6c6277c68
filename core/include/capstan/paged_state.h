// defines: PagedState: the keys and values of many sequences in pages of a fixed pool.
#pragma once
#include <capstan/state.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace capstan {

/// What a forward is made for, whatever it holds: then the tables that append() returns keep their place, and a recorded forward
/// serves every later one of the same capacity. Rows and sequences past those of the forward are nobody's.
struct PagedCapacity {
  std::int64_t sequences = 0;  ///< 0: as many as there are
  std::int64_t rows = 0, pages = 0;  ///< of all tokens together; of one sequence
};

/// A pool of pages of 64 tokens (attention's tile), handed out to sequences as they grow (Kwon et al. 2023). One page
/// number stands for the same page in every layer. A sequence has an id, the tokens that it holds, and the version of
/// the weights that computed them. A forward lies between begin() and end():
///
///     std::int64_t s = state.open(version);
///     state.begin(ids, new_tokens);      // pages for all of them, or an error and no change
///     ... forward, whose blocks call append() ...
///     state.end();                       // the sequences are longer now; cancel() if the forward failed
///
/// Not thread-safe.
class CAPSTAN_API PagedState : public SequenceState {
 public:
  static constexpr std::int64_t page_tokens = 64;

  /// Pages for `tokens` tokens (rounded up to whole pages) in each of `specs`. Error(input) on a kind of state other
  /// than paged, Error(runtime) when memory is short.
  PagedState(Device& device, DType dtype, std::span<const StateSpec> specs, std::int64_t tokens);
  ~PagedState() override;

  /// A new, empty sequence. Takes no pages yet.
  std::int64_t open(std::uint64_t weights_version);
  /// Forgets a sequence; pages that no fork shares are free again.
  void close(std::int64_t id);
  /// Tokens held.
  std::int64_t length(std::int64_t id) const;
  std::int64_t sequences() const { return static_cast<std::int64_t>(sequences_.size()); }

  std::int64_t pages() const { return static_cast<std::int64_t>(references_.size()); }
  std::int64_t pages_free() const { return static_cast<std::int64_t>(free_.size()); }
  /// Free pages that a forward with `tokens` new tokens of sequence `id` would take, copies on write included.
  std::int64_t pages_needed(std::int64_t id, std::int64_t tokens) const;
  static std::int64_t pages_of(std::int64_t tokens) { return (tokens + page_tokens - 1) / page_tokens; }

  /// Opens a forward in which sequence ids[i] gets tokens[i] new tokens (at least one; each id once), in the order of the
  /// batch's sequences. Error(runtime) when the pool is too small; nothing has changed then.
  void begin(std::span<const std::int64_t> ids, std::span<const std::int32_t> tokens, const PagedCapacity& capacity = {});
  /// The forward is done: its tokens are held.
  void end();
  /// The forward failed: the sequences are as before begin().
  void cancel();

  PagedKV append(std::string_view name, const Tensor& k, const Tensor& v) override;
  /// Error(programming): there are pages only.
  Tensor slot(std::string_view name) override;
  /// Error(programming) when `length` is more than is held or less than is committed.
  void truncate(std::int64_t id, std::int64_t length) override;
  void commit(std::int64_t id, std::int64_t length) override;
  std::int64_t fork(std::int64_t id) override;
  std::uint64_t weights_version(std::int64_t id) const override;

 private:
  struct Sequence {
    std::vector<std::int32_t> blocks;
    std::int64_t length = 0, committed = 0;
    std::uint64_t version = 0;
  };
  struct Store {
    Tensor k, v;
    Dims shape;
  };  // [pages, kv_heads, page, head_size]
  struct Part {
    std::int64_t id, tokens;
  };  // of the forward in progress
  Sequence& find(std::int64_t id, const char* what);
  const Sequence& find(std::int64_t id, const char* what) const;
  std::int32_t take();
  void drop(std::int32_t page);
  void copy_page(std::int32_t from, std::int32_t to) const;
  void refuse_inside(const char* what) const;

  std::shared_ptr<Device> device_;
  std::map<std::string, Store, std::less<>> stores_;
  std::vector<std::int32_t> references_, free_;  // per page; free pages, lowest last
  std::map<std::int64_t, Sequence> sequences_;
  std::int64_t next_id_ = 0;
  std::vector<Part> forward_;
  std::int64_t forward_tokens_ = 0;
  struct Tables { Tensor blocks, lengths, rows; };  // of the forward; rows of the pages, for each token
  Tables tables_;
  std::map<std::int64_t, Tables> fixed_;  // by PagedCapacity::sequences
};

}  // namespace capstan
