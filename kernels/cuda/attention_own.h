// defines: the own attention kernels: on tensor cores for bf16, plain for f32 and f64. Any head size from 1 to 256; no
// float atomics anywhere: the same bits on every run.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

void attention_forward_tensor(Context& ctx, const Attention& a);
void attention_backward_tensor(Context& ctx, const Attention& a);
void attention_paged_tensor(Context& ctx, const PagedAttention& a);

/// a.num f32 or f64.
void attention_forward_plain(Context& ctx, const Attention& a);
void attention_backward_plain(Context& ctx, const Attention& a);
void attention_paged_plain(Context& ctx, const PagedAttention& a);

/// delta[h, t] = sum over head h's columns of out[t] * dout[t], in the compute type; [heads, rows].
void attention_delta(Context& ctx, const Attention& a, void* delta);

}  // namespace capstan::kernels::cuda
