// defines: AttentionArgs and the CPU attention kernels: causal, ragged, grouped-query, tiled.
#pragma once
#include <kernels/cpu/context.h>

#include <algorithm>
#include <cstdint>

namespace capstan::kernels::cpu {

/// Keys are summed over in tiles of this many, counted from the sequence's start.
inline constexpr std::int64_t attention_tile = 64;

/// Keys that the row at `position` of its sequence sees begin here; window 0: all before it.
inline std::int64_t first_seen(std::int64_t position, std::int64_t window) {
  return window > 0 ? std::max<std::int64_t>(0, position - window + 1) : 0;
}

/// T: storage (double, float, bf16). Rows t of q, k, v and out are `*_stride` elements apart; head h starts
/// at column h * head_size. Sequence s has rows [starts[s], starts[s + 1]); with key_begins its keys lie elsewhere
/// (kernels::Attention says how).
template <class T>
struct AttentionArgs {
  const T *q = nullptr, *k = nullptr, *v = nullptr;
  T* out = nullptr;
  std::int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0;
  std::int64_t heads = 0, kv_heads = 0, head_size = 0, window = 0;
  double scale = 1;
  const std::int32_t* starts = nullptr;
  const std::int32_t *key_begins = nullptr, *key_counts = nullptr;
  std::int64_t sequences = 0, rows = 0;
  std::int64_t key_begin(std::int64_t s) const { return key_begins != nullptr ? key_begins[s] : starts[s]; }
  std::int64_t key_count(std::int64_t s) const { return key_begins != nullptr ? key_counts[s] : starts[s + 1] - starts[s]; }
  /// log-sum-exp of each row's scores, [heads, rows]; compute type (f64 for double, else f32).
  void* lse = nullptr;
  // Backward:
  const T* dout = nullptr;
  std::int64_t dout_stride = 0;
  T *dq = nullptr, *dk = nullptr, *dv = nullptr;  ///< rows dq_stride, dkv_stride apart
  std::int64_t dq_stride = 0, dkv_stride = 0;
};

template <class T> void attention_forward(Context& context, const AttentionArgs<T>& args);
template <class T> void attention_backward(Context& context, const AttentionArgs<T>& args);

/// Keys and values in pages of attention_tile tokens: [pages, kv_heads, attention_tile, head_size]. The rows
/// of sequence s are its last starts[s + 1] - starts[s] tokens; it holds lengths[s] in all.
template <class T>
struct PagedAttentionArgs {
  const T* q = nullptr;
  T* out = nullptr;
  std::int64_t q_stride = 0, out_stride = 0;
  const T *k_pages = nullptr, *v_pages = nullptr;
  const std::int32_t *blocks = nullptr, *lengths = nullptr, *starts = nullptr;
  std::int64_t blocks_stride = 0, sequences = 0;
  std::int64_t heads = 0, kv_heads = 0, head_size = 0, window = 0;
  double scale = 1;
};

template <class T> void attention_paged(Context& context, const PagedAttentionArgs<T>& args);

}  // namespace capstan::kernels::cpu
