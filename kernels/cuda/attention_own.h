// defines: the own attention kernels: on tensor cores for bf16, plain for f32 and f64. Any head size from 1 to 256; no
// float atomics anywhere: the same bits on every run.
#pragma once
#include <kernels/cuda/context.h>

namespace capstan::kernels::cuda {

// a.starts null: one sequence, its rows the last ones of a.host_key_counts[0] keys, all at the pointers themselves; dk and dv
// are added to.
void attention_forward_tensor(Context& ctx, const Attention& a);
/// `delta`: of attention_delta(), from a's first row on.
void attention_backward_tensor(Context& ctx, const Attention& a, const void* delta);
void attention_paged_tensor(Context& ctx, const PagedAttention& a);

/// a.num f32 or f64.
void attention_forward_plain(Context& ctx, const Attention& a);
void attention_backward_plain(Context& ctx, const Attention& a, const void* delta);
void attention_paged_plain(Context& ctx, const PagedAttention& a);

/// Rows of the one sequence, and keys ahead of them; 0 where there are several.
inline int rows_of_one(const Attention& a) { return a.starts != nullptr ? 0 : a.host_starts[1]; }
inline int keys_ahead_of_one(const Attention& a) { return a.starts != nullptr ? 0 : a.host_key_counts[0] - a.host_starts[1]; }

/// delta[h, t] = sum over head h's columns of out[t] * dout[t], in the compute type; [heads, rows].
void attention_delta(Context& ctx, const Attention& a, void* delta);

}  // namespace capstan::kernels::cuda
