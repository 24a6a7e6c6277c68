// defines: score_rows and its backward, weighted_sum: the language model head between its products.
#pragma once
#include <kernels/cpu/context.h>
#include <kernels/types.h>

namespace capstan::kernels::cpu {

/// Each row of logits to the target's log-probability, log-sum-exp and entropy; see ScoreRows.
void score_rows(Context& ctx, const ScoreRows& s);
/// dlogit_j = g_logprob (1[j = target] - p_j) + g_lse p_j - g_entropy p_j (log p_j + H).
void score_rows_backward(Context& ctx, const ScoreRows& s);
/// *out = -sum_t weights[t] * logprob[t], summed in f64 and in order: one number, many tokens. compute: f32 or f64.
void weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out);

}  // namespace capstan::kernels::cpu
