// Tile sizes and shared memory of the own attention kernels.
#include <kernels/cuda/attention_plan.h>

#include <algorithm>
#include <initializer_list>

namespace capstan::kernels::cuda {

namespace {
/// Bytes of one row of a bf16 tile: whole groups of 128 bytes, within which 16-byte chunks are swizzled.
std::int64_t row_bytes(int width) { return (width + 63) / 64 * 128; }
}  // namespace

int attention_width(std::int64_t head_size) {
  for (const int w : {32, 64, 96, 128, 192, 256})
    if (head_size <= w) return w;
  return 0;
}

std::int64_t attention_window(std::int64_t window, const std::int32_t* starts, std::int64_t sequences) {
  std::int64_t longest = 0;
  for (std::int64_t s = 0; s < sequences; ++s) longest = std::max<std::int64_t>(longest, starts[s + 1] - starts[s]);
  return window < longest ? window : 0;
}

AttentionPlan plan_attention_forward(std::int64_t head_size, bool paged, int capability) {
  AttentionPlan p;
  p.width = attention_width(head_size);
  p.warps = 4;
  // Two strips share each load of the keys, as far as registers reach.
  p.strips = !paged && (p.width <= 64 || (p.width == 128 && capability < 100)) ? 2 : 1;
  p.rows = p.warps * p.strips * 16;
  p.shared_bytes = (p.rows + 4 * attention_keys) * row_bytes(p.width);  // queries, two stages of keys and values
  return p;
}

AttentionPlan plan_attention_dkv(std::int64_t head_size) {
  AttentionPlan p;
  p.width = attention_width(head_size);
  p.column_parts = p.width <= 128 ? 1 : 2;
  p.warps = 4 * p.column_parts;
  p.strips = 1;
  p.rows = 64;
  p.shared_bytes = (2 * attention_keys + 4 * p.rows) * row_bytes(p.width) + 4 * p.rows * 4;
  return p;
}

AttentionPlan plan_attention_dq(std::int64_t head_size) {
  AttentionPlan p;
  p.width = attention_width(head_size);
  p.warps = 4;
  p.strips = 1;
  p.rows = 64;
  p.shared_bytes = (2 * p.rows + 4 * attention_keys) * row_bytes(p.width);
  return p;
}

std::int64_t attention_tiles(const std::int32_t* starts, std::int64_t sequences, std::int64_t total, std::int64_t rows, std::int64_t times) {
  if (starts == nullptr) return total * times / rows + sequences;
  std::int64_t n = 0;
  for (std::int64_t s = 0; s < sequences; ++s) n += ((starts[s + 1] - starts[s]) * times + rows - 1) / rows;
  return n;
}

PlainAttentionPlan plan_plain_attention(std::int64_t head_size, int compute_bytes, bool backward) {
  PlainAttentionPlan p;
  p.width = head_size <= 64 ? 64 : head_size <= 128 ? 128 : 256;
  p.tile = compute_bytes == 8 ? 16 : 32;
  // One element of padding a row keeps columns on different banks.
  const std::int64_t tiles = static_cast<std::int64_t>(p.tile) * (p.width + 1) * (backward ? 4 : 3);
  p.shared_bytes = (tiles + static_cast<std::int64_t>(backward ? 2 : 1) * p.tile * (p.tile + 1) + 2 * p.tile) * compute_bytes;
  return p;
}

}  // namespace capstan::kernels::cuda
