// Attention: which kernels run. cuDNN where it is wanted and takes the shape, own kernels elsewhere: f32, f64, pages, head
// sizes or addresses that cuDNN refuses, and backwards in one order over sequences of different lengths.
#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_plan.h>
#include <kernels/cuda/grid_plan.h>
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

namespace capstan::kernels::cuda {

namespace {

void check_shape(const char* op, Num num, std::int64_t head_size, std::int64_t window, double scale) {
  if (attention_width(head_size) == 0)
    throw std::invalid_argument(std::string("[cuda] ") + op + ": head size: expected 1 to 256, got " + std::to_string(head_size));
  if (num != Num::f64 && num != Num::f32 && num != Num::bf16) throw std::invalid_argument(std::string("[cuda] ") + op + ": element type: expected f64, f32 or bf16");
  if (window < 0) throw std::invalid_argument(std::string("[cuda] ") + op + ": window: expected a number of keys, or 0 for all, got " + std::to_string(window));
  if (!(scale > 0)) throw std::invalid_argument(std::string("[cuda] ") + op + ": scale: expected a number above 0, got " + std::to_string(scale));
}

/// Throws when the own kernels would have more tiles of rows, or backward of keys, than a grid has. `times`: heads that are packed into rows.
template <class Shape>
void check_tiles(const char* op, const Shape& a, bool backward, int capability, std::int64_t times) {
  const int rows = a.num != Num::bf16 ? plan_plain_attention(a.head_size, a.num == Num::f64 ? 8 : 4, backward).tile
                   : backward         ? plan_attention_dq(a.head_size).rows
                                      : plan_attention_forward(a.head_size, std::is_same_v<Shape, PagedAttention>, capability).rows;
  checked(op, attention_blocks(a.heads, attention_tiles(a.host_starts, a.sequences, a.rows, rows, times)));
  if constexpr (std::is_same_v<Shape, Attention>) {
    if (backward && a.host_key_counts != nullptr) checked(op, attention_blocks(a.kv_heads, blocks_for(a.host_key_counts[0], rows)));
  }
}

Attention with_plain_window(const Attention& a) {
  Attention b = a;
  // By the batch's capacity, recorded or not: the same kernels, the same bits.
  b.window = a.window < a.longest ? a.window : a.host_starts == nullptr ? 0 : attention_window(a.window, a.host_starts, a.sequences);
  return b;
}

std::int64_t compute_bytes(const Attention& a) { return a.num == Num::f64 ? 8 : 4; }

/// run(one, row) for each sequence whose keys are other rows than its own: alone, its pointers moved to its first row and key, which
/// the kernels know by the missing `starts`. One after the other: the same keys' gradients are added to in that order.
template <class Run>
void for_stretches(const Attention& a, Run&& run) {
  const std::int64_t bytes = bytes_of(a.num);
  const auto moved = [&](auto* p, std::int64_t elements) -> decltype(p) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const char, char>;
    return p == nullptr ? nullptr : static_cast<Byte*>(p) + elements * bytes;
  };
  for (std::int64_t s = 0; s < a.sequences; ++s) {
    const std::int64_t row = a.host_starts[s], key = a.host_key_begins[s];
    const std::int32_t starts[] = {0, a.host_starts[s + 1] - a.host_starts[s]}, keys[] = {0, a.host_key_counts[s]};
    if (starts[1] == 0) continue;
    Attention one = a;
    one.starts = nullptr, one.host_starts = starts, one.sequences = 1, one.host_key_begins = keys, one.host_key_counts = keys + 1;
    one.window = attention_window(a.window, keys, 1);
    one.q = moved(a.q, row * a.q_stride), one.out = moved(a.out, row * a.out_stride), one.dout = moved(a.dout, row * a.dout_stride);
    one.dq = moved(a.dq, row * a.dq_stride), one.k = moved(a.k, key * a.k_stride), one.v = moved(a.v, key * a.v_stride);
    one.dk = moved(a.dk, key * a.dkv_stride), one.dv = moved(a.dv, key * a.dkv_stride);
    if (a.lse != nullptr) one.lse = static_cast<char*>(a.lse) + row * compute_bytes(a);
    run(one, row);
  }
}

/// Rows past the last sequence belong to nobody: they are zero.
void clear_dead(Context& ctx, const Attention& a, void* to, std::int64_t stride, std::int64_t heads) {
  if (a.host_starts == nullptr) return;  // all rows are in use
  const std::int64_t used = a.host_starts[a.sequences], bytes = bytes_of(a.num);
  if (used >= a.rows) return;
  check(cudaMemset2DAsync(static_cast<char*>(to) + used * stride * bytes, static_cast<std::size_t>(stride * bytes), 0, static_cast<std::size_t>(heads * a.head_size * bytes),
                          static_cast<std::size_t>(a.rows - used), ctx.stream()),
        "attention: dead rows");
}

#if defined(CAPSTAN_CUDNN)
struct Cudnn {
  std::unique_ptr<CudnnAttention> attention;
  std::string why;
};

/// Null when cuDNN is not wanted, not there, or does not take the shape.
CudnnAttention* cudnn_for(Context& ctx, const Attention& a, bool backward) {
  if (!ctx.attention_choice.cudnn || !cudnn_refuses(a, backward, ctx.capability()).empty()) return nullptr;
  if (!ctx.attention_state) {
    auto state = std::make_shared<Cudnn>();
    try {
      state->attention = std::make_unique<CudnnAttention>(ctx);
    } catch (const std::exception& e) {
      state->why = e.what();
    }
    ctx.attention_state = std::move(state);
  }
  return static_cast<Cudnn*>(ctx.attention_state.get())->attention.get();
}
#endif

bool forward_by_cudnn(Context& ctx, const Attention& a) {
#if defined(CAPSTAN_CUDNN)
  if (CudnnAttention* cudnn = cudnn_for(ctx, a, false)) return cudnn->forward(ctx, a, ctx.attention_choice.workspace);
#endif
  static_cast<void>(ctx), static_cast<void>(a);
  return false;
}

/// In one order where that is asked: cuDNN's ordered backward serves sequences of one length, within the workspace that
/// is allowed; others go to the own kernels, whose sums always have one order.
bool backward_by_cudnn(Context& ctx, const Attention& a) {
#if defined(CAPSTAN_CUDNN)
  if (CudnnAttention* cudnn = cudnn_for(ctx, a, true)) return cudnn->backward(ctx, a, !a.any_order, ctx.attention_choice.workspace);
#endif
  static_cast<void>(ctx), static_cast<void>(a);
  return false;
}

}  // namespace

void attention(Context& ctx, const Attention& asked) {
  check_shape("attention", asked.num, asked.head_size, asked.window, asked.scale);
  if (asked.rows == 0) return;
  const auto own = [&](const Attention& a) {
    check_tiles("attention", a, false, ctx.capability(), 1);
    a.num == Num::bf16 ? attention_forward_tensor(ctx, a) : attention_forward_plain(ctx, a);
  };
  if (asked.host_key_begins != nullptr) {
    for_stretches(asked, [&](const Attention& one, std::int64_t) { own(one); });
  } else if (const Attention a = with_plain_window(asked); !forward_by_cudnn(ctx, a)) {
    own(a);
  }
  clear_dead(ctx, asked, asked.out, asked.out_stride, asked.heads);
}

void attention_backward(Context& ctx, const Attention& asked) {
  check_shape("attention_backward", asked.num, asked.head_size, asked.window, asked.scale);
  if (asked.rows == 0) return;
  const auto own = [&](const Attention& a, const char* delta) {
    check_tiles("attention_backward", a, true, ctx.capability(), 1);
    a.num == Num::bf16 ? attention_backward_tensor(ctx, a, delta) : attention_backward_plain(ctx, a, delta);
  };
  const auto delta_of = [&](const Attention& a) {
    void* delta = ctx.scratch(a.heads * a.rows * compute_bytes(a));
    attention_delta(ctx, a, delta);
    return static_cast<const char*>(delta);
  };
  clear_dead(ctx, asked, asked.dq, asked.dq_stride, asked.heads);
  if (asked.host_key_begins != nullptr) {
    const char* delta = delta_of(asked);
    for_stretches(asked, [&](const Attention& one, std::int64_t row) { own(one, delta + row * compute_bytes(one)); });
    return;
  }
  const Attention a = with_plain_window(asked);
  if (!backward_by_cudnn(ctx, a)) own(a, delta_of(a));
  clear_dead(ctx, a, a.dk, a.dkv_stride, a.kv_heads);
  clear_dead(ctx, a, a.dv, a.dkv_stride, a.kv_heads);
}

void attention_paged(Context& ctx, const PagedAttention& a) {
  check_shape("attention_paged", a.num, a.head_size, a.window, a.scale);
  if (a.page % attention_keys != 0)
    throw std::invalid_argument("[cuda] attention_paged: page size: expected a multiple of " + std::to_string(attention_keys) + ", got " + std::to_string(a.page));
  if (a.rows == 0) return;
  check_tiles("attention_paged", a, false, ctx.capability(), a.num == Num::bf16 ? a.heads / a.kv_heads : 1);
  if (a.num == Num::bf16) attention_paged_tensor(ctx, a);
  else attention_paged_plain(ctx, a);
  if (a.host_starts == nullptr) return;
  const std::int64_t used = a.host_starts[a.sequences], bytes = bytes_of(a.num);
  if (used < a.rows)
    check(cudaMemset2DAsync(static_cast<char*>(a.out) + used * a.out_stride * bytes, static_cast<std::size_t>(a.out_stride * bytes), 0,
                            static_cast<std::size_t>(a.heads * a.head_size * bytes), static_cast<std::size_t>(a.rows - used), ctx.stream()),
          "attention_paged: dead rows");
}

}  // namespace capstan::kernels::cuda
