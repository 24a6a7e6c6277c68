// Attention: which kernels run. cuDNN where it is wanted and takes the shape, own kernels elsewhere: f32, f64, pages, head
// sizes or addresses that cuDNN refuses, and backwards in one order over sequences of different lengths.
#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_plan.h>
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#endif

#include <stdexcept>
#include <string>

namespace capstan::kernels::cuda {

namespace {

void check_shape(const char* op, Num num, std::int64_t head_size, std::int64_t window, double scale) {
  if (attention_width(head_size) == 0)
    throw std::invalid_argument(std::string("[cuda] ") + op + ": head size: expected 1 to 256, got " + std::to_string(head_size));
  if (num != Num::f64 && num != Num::f32 && num != Num::bf16) throw std::invalid_argument(std::string("[cuda] ") + op + ": element type: expected f64, f32 or bf16");
  if (window < 0) throw std::invalid_argument(std::string("[cuda] ") + op + ": window: expected a number of keys, or 0 for all, got " + std::to_string(window));
  if (!(scale > 0)) throw std::invalid_argument(std::string("[cuda] ") + op + ": scale: expected a number above 0, got " + std::to_string(scale));
}

Attention with_plain_window(const Attention& a) {
  Attention b = a;
  b.window = attention_window(a.window, a.host_starts, a.sequences);
  return b;
}

/// Rows past the last sequence belong to nobody: they are zero.
void clear_dead(Context& ctx, const Attention& a, void* to, std::int64_t stride, std::int64_t heads) {
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
  if (CudnnAttention* cudnn = cudnn_for(ctx, a, false)) return cudnn->forward(ctx, a);
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
  const Attention a = with_plain_window(asked);
  if (forward_by_cudnn(ctx, a)) {
  } else if (a.num == Num::bf16) {
    attention_forward_tensor(ctx, a);
  } else {
    attention_forward_plain(ctx, a);
  }
  clear_dead(ctx, a, a.out, a.out_stride, a.heads);
}

void attention_backward(Context& ctx, const Attention& asked) {
  check_shape("attention_backward", asked.num, asked.head_size, asked.window, asked.scale);
  if (asked.rows == 0) return;
  const Attention a = with_plain_window(asked);
  if (backward_by_cudnn(ctx, a)) {
  } else if (a.num == Num::bf16) {
    attention_backward_tensor(ctx, a);
  } else {
    attention_backward_plain(ctx, a);
  }
  clear_dead(ctx, a, a.dq, a.dq_stride, a.heads);
  clear_dead(ctx, a, a.dk, a.dkv_stride, a.kv_heads);
  clear_dead(ctx, a, a.dv, a.dkv_stride, a.kv_heads);
}

void attention_paged(Context& ctx, const PagedAttention& a) {
  check_shape("attention_paged", a.num, a.head_size, a.window, a.scale);
  if (a.page % attention_keys != 0)
    throw std::invalid_argument("[cuda] attention_paged: page size: expected a multiple of " + std::to_string(attention_keys) + ", got " + std::to_string(a.page));
  if (a.rows == 0) return;
  if (a.num == Num::bf16) attention_paged_tensor(ctx, a);
  else attention_paged_plain(ctx, a);
  const std::int64_t used = a.host_starts[a.sequences], bytes = bytes_of(a.num);
  if (used < a.rows)
    check(cudaMemset2DAsync(static_cast<char*>(a.out) + used * a.out_stride * bytes, static_cast<std::size_t>(a.out_stride * bytes), 0,
                            static_cast<std::size_t>(a.heads * a.head_size * bytes), static_cast<std::size_t>(a.rows - used), ctx.stream()),
          "attention_paged: dead rows");
}

}  // namespace capstan::kernels::cuda
