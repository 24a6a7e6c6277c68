// defines: the launch plans of the own attention kernels. Plain host code, tested without a GPU.
#pragma once
#include <cstdint>

namespace capstan::kernels::cuda {

/// Keys are summed over in tiles of this many, counted from the sequence's start, whatever the path: a row's result
/// depends on its sequence alone, and a decoded row equals the same row of a long forward.
inline constexpr int attention_keys = 64;

/// Head sizes are rounded up to one of these; the columns in between are zero.
int attention_width(std::int64_t head_size);

/// The window that kernels are told: 0 where it hides nothing of any sequence, and never near what an int holds.
std::int64_t attention_window(std::int64_t window, const std::int32_t* starts, std::int64_t sequences);

struct AttentionPlan {
  int width = 0;        ///< columns computed
  int rows = 0;         ///< query rows of a tile
  int warps = 0, strips = 0;  ///< each warp owns `strips` strips of 16 rows
  int column_parts = 1;       ///< backward: warps that share a strip, each with a part of the columns
  std::int64_t shared_bytes = 0;
};
/// Tensor-core kernels (bf16). capability: 90, 100, ...
AttentionPlan plan_attention_forward(std::int64_t head_size, bool paged, int capability);
AttentionPlan plan_attention_dkv(std::int64_t head_size);
AttentionPlan plan_attention_dq(std::int64_t head_size);

/// Tiles of `rows` rows over sequences [starts[s], starts[s + 1]), none of which spans two sequences. `times` counts
/// a row several times (heads packed into rows). Starts null: the most that sequences of `total` rows together can have.
std::int64_t attention_tiles(const std::int32_t* starts, std::int64_t sequences, std::int64_t total, std::int64_t rows, std::int64_t times = 1);

/// Kernels without tensor cores (f32, f64): tile is rows and keys of a tile.
struct PlainAttentionPlan { int tile = 0, width = 0; std::int64_t shared_bytes = 0; };
PlainAttentionPlan plan_plain_attention(std::int64_t head_size, int compute_bytes, bool backward);

}  // namespace capstan::kernels::cuda
