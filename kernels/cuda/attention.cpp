// Attention: which kernels run.
#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/attention_plan.h>

#include <stdexcept>
#include <string>

namespace capstan::kernels::cuda {

namespace {

void check_shape(const char* op, Num num, std::int64_t head_size, double scale) {
  if (attention_width(head_size) == 0)
    throw std::invalid_argument(std::string("[cuda] ") + op + ": head size: expected 1 to 256, got " + std::to_string(head_size));
  if (num != Num::f64 && num != Num::f32 && num != Num::bf16) throw std::invalid_argument(std::string("[cuda] ") + op + ": element type: expected f64, f32 or bf16");
  if (!(scale > 0)) throw std::invalid_argument(std::string("[cuda] ") + op + ": scale: expected a number above 0, got " + std::to_string(scale));
}

/// Rows past the last sequence belong to nobody: they are zero.
void clear_dead(Context& ctx, const Attention& a, void* to, std::int64_t stride, std::int64_t heads) {
  const std::int64_t used = a.host_starts[a.sequences], bytes = bytes_of(a.num);
  if (used >= a.rows) return;
  check(cudaMemset2DAsync(static_cast<char*>(to) + used * stride * bytes, static_cast<std::size_t>(stride * bytes), 0, static_cast<std::size_t>(heads * a.head_size * bytes),
                          static_cast<std::size_t>(a.rows - used), ctx.stream()),
        "attention: dead rows");
}

}  // namespace

void attention(Context& ctx, const Attention& a) {
  check_shape("attention", a.num, a.head_size, a.scale);
  if (a.rows == 0) return;
  if (a.num == Num::bf16) attention_forward_tensor(ctx, a);
  else attention_forward_plain(ctx, a);
  clear_dead(ctx, a, a.out, a.out_stride, a.heads);
}

void attention_backward(Context& ctx, const Attention& a) {
  check_shape("attention_backward", a.num, a.head_size, a.scale);
  if (a.rows == 0) return;
  if (a.num == Num::bf16) attention_backward_tensor(ctx, a);
  else attention_backward_plain(ctx, a);
  clear_dead(ctx, a, a.dq, a.dq_stride, a.heads);
  clear_dead(ctx, a, a.dk, a.dkv_stride, a.kv_heads);
  clear_dead(ctx, a, a.dv, a.dkv_stride, a.kv_heads);
}

void attention_paged(Context& ctx, const PagedAttention& a) {
  check_shape("attention_paged", a.num, a.head_size, a.scale);
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
