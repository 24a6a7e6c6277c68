// Which attention goes to cuDNN, and in what pieces: plain host code.
#include <kernels/cuda/cudnn_attention.h>

#include <algorithm>

namespace capstan::kernels::cuda {

namespace {

std::int64_t power_of_two(std::int64_t n) {
  std::int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

/// Of one sequence: the tokens of the longest, or what any may have.
std::int64_t longest_of(const Attention& a) {
  std::int64_t longest = a.host_starts == nullptr ? a.longest : 0;
  for (std::int64_t i = 0; a.host_starts != nullptr && i < a.sequences; ++i) longest = std::max<std::int64_t>(longest, a.host_starts[i + 1] - a.host_starts[i]);
  return longest;
}

bool equal_lengths(const Attention& a) {
  if (a.host_starts == nullptr) return false;
  const std::int64_t length = a.host_starts[1] - a.host_starts[0];
  for (std::int64_t s = 1; s < a.sequences; ++s)
    if (a.host_starts[s + 1] - a.host_starts[s] != length) return false;
  return true;
}

std::int64_t largest_divisor(std::int64_t n, std::int64_t most) {
  for (std::int64_t d = std::min(n, most); d > 0; --d)
    if (n % d == 0) return d;
  return 0;
}

}  // namespace

CudnnShape cudnn_shape(const Attention& a, bool backward, bool ordered) {
  CudnnShape s;
  s.ragged = !equal_lengths(a);
  std::int64_t longest = longest_of(a);
  if (s.ragged) longest = std::max(longest, a.longest);  // by the batch's capacity, recorded or not: the same graph, the same bits
  s.batch = s.ragged ? power_of_two(a.sequences) : a.sequences;
  s.length = s.ragged ? std::max<std::int64_t>(128, power_of_two(longest)) : longest;
  s.window = a.window < longest ? a.window : 0;
  s.heads = a.heads, s.kv_heads = a.kv_heads, s.head_size = a.head_size, s.rows = a.rows;
  s.q_stride = a.q_stride, s.k_stride = a.k_stride, s.v_stride = a.v_stride, s.out_stride = a.out_stride;
  s.backward = backward, s.stats = backward || a.lse != nullptr;
  if (backward) s.dout_stride = a.dout_stride, s.dq_stride = a.dq_stride, s.dkv_stride = a.dkv_stride, s.ordered = ordered;
  return s;
}

std::string cudnn_refuses(const Attention& a, bool backward, int capability) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  if (a.num != Num::bf16) return "the element type is not bf16";
  if (a.sequences < 1) return "there are no sequences";
  if (a.head_size % 8 != 0 || a.head_size > (backward && capability >= 100 ? 128 : 256)) return "the head size is not a multiple of 8 or is too large";
  if ((a.q_stride | a.k_stride | a.v_stride | a.out_stride) % 8 != 0 || !aligned(a.q) || !aligned(a.k) || !aligned(a.v) || !aligned(a.out))
    return "rows do not begin on 16 bytes";
  if (backward && ((a.dout_stride | a.dq_stride | a.dkv_stride) % 8 != 0 || !aligned(a.dout) || !aligned(a.dq) || !aligned(a.dk) || !aligned(a.dv)))
    return "rows of the gradients do not begin on 16 bytes";
  if (backward && !a.any_order && capability >= 100) return "an order of sums is not promised by the engine that it takes on this GPU";
  if (backward && a.any_order && a.head_size % 16 != 0 && !equal_lengths(a)) return "sums over sequences of different lengths want a head size that is a multiple of 16";
  if (longest_of(a) < 2) return "no sequence has two tokens";
  const std::int64_t widest = std::max({a.q_stride, a.k_stride, a.v_stride, a.out_stride, a.dout_stride, a.dq_stride, a.dkv_stride});
  if (a.rows * widest > 0x7fffffff) return "offsets do not fit 32 bits";
  return {};
}

bool cudnn_wants_padding(const CudnnShape& s, std::int64_t version) { return s.backward && !s.ragged && s.length % 128 != 0 && version <= 91500; }

CudnnChunk cudnn_ordered_chunk(const CudnnShape& s, std::int64_t bytes) {
  const std::int64_t padded = (s.length + 127) / 128 * 128;
  const std::int64_t group = s.heads / s.kv_heads;
  // A key/value head's gradients of scores in bf16, and where heads share it, those of its keys and values for each.
  const std::int64_t one = group * (padded * padded * 2 + (group > 1 ? 2 * padded * s.head_size * 2 : 0));
  const std::int64_t fit = bytes / one;
  CudnnChunk c;
  c.kv_heads = largest_divisor(s.kv_heads, fit);
  c.batch = c.kv_heads == s.kv_heads ? largest_divisor(s.batch, fit / s.kv_heads) : c.kv_heads > 0 ? 1 : 0;
  return c;
}

CudnnChunk cudnn_fit(const CudnnShape& s, CudnnChunk c, const std::function<bool(const CudnnChunk&)>& fits) {
  while (c.kv_heads > 0 && !fits(c)) {
    if (c.batch > 1) c.batch = largest_divisor(s.batch, c.batch - 1);
    else c.kv_heads = largest_divisor(s.kv_heads, c.kv_heads - 1);
  }
  return c;
}

}  // namespace capstan::kernels::cuda
