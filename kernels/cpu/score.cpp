// The head's softmax over rows of logits, forward and backward.
#include <kernels/cpu/copy.h>
#include <kernels/cpu/score.h>
#include <kernels/cpu/softmax_rows.h>

namespace capstan::kernels::cpu {

namespace {

template <class A>
void score(Context& ctx, const ScoreRows& s) {
  A* logprob = static_cast<A*>(s.logprob);
  A* lse = static_cast<A*>(s.logsumexp);
  A* entropy = static_cast<A*>(s.entropy);
#pragma omp parallel for num_threads(ctx.threads()) schedule(static)
  for (std::int64_t r = 0; r < s.rows; ++r) {
    A* logit = static_cast<A*>(s.logits) + r * s.stride;
    const std::int32_t y = s.targets[r];
    const A chosen = y >= 0 ? logit[y] : A(0);
    const auto row = score_row<A>(logit, s.cols, s.weights != nullptr);
    lse[r] = row.logsumexp;
    entropy[r] = row.entropy;
    logprob[r] = y >= 0 ? chosen - row.logsumexp : A(0);
    if (s.weights != nullptr) {
      const A w = y >= 0 ? static_cast<A>(s.weights[r]) : A(0);
      scale_row<A>(logit, s.cols, w / row.sum);
      if (y >= 0) logit[y] -= w;
    }
  }
}

template <class A>
void differentiate(Context& ctx, const ScoreRows& s) {
  using V = Vec<A>;
  const A* g[3] = {static_cast<const A*>(s.g_logprob), static_cast<const A*>(s.g_logsumexp), static_cast<const A*>(s.g_entropy)};
  const A* lse = static_cast<const A*>(s.logsumexp);
  const A* h = static_cast<const A*>(s.entropy);
#pragma omp parallel for num_threads(ctx.threads())
  for (std::int64_t r = 0; r < s.rows; ++r) {
    A* logit = static_cast<A*>(s.logits) + r * s.stride;
    const bool none = s.targets[r] < 0;
    const A lp = g[0] && !none ? g[0][r] : A(0), ls = g[1] ? g[1][r] : A(0), en = g[2] ? g[2][r] : A(0);
    const V shift(lse[r]), factor(ls - lp), mix(en), level(h[r]), zero(A(0));
    const bool mixed = en != A(0);
    for_blocks<A>(s.cols, [&](std::int64_t j, auto m) {
      const V log_p = V::load(logit + j, m) - shift, prob = exp_flushed(log_p);
      V d = prob * factor;
      if (mixed) d = d - select(prob > zero, mix * prob * (log_p + level), zero);
      d.store(logit + j, m);
    });
    if (!none) logit[s.targets[r]] += lp;
  }
}

/// The gradient in the model's narrower type, where that is asked for.
void narrow(Context& ctx, const ScoreRows& s) {
  if (s.narrow == nullptr) return;
  Strided shape;
  shape.rank = 2;
  shape.shape[0] = s.rows, shape.shape[1] = s.cols;
  shape.to[0] = shape.from[0] = s.stride, shape.to[1] = shape.from[1] = 1;
  copy(ctx, shape, Num::bf16, s.narrow, s.compute, s.logits);
}

}  // namespace

void score_rows(Context& ctx, const ScoreRows& s) {
  if (s.compute == Num::f64) score<double>(ctx, s);
  else score<float>(ctx, s);
  if (s.weights != nullptr) narrow(ctx, s);
}

void score_rows_backward(Context& ctx, const ScoreRows& s) {
  if (s.compute == Num::f64) differentiate<double>(ctx, s);
  else differentiate<float>(ctx, s);
  narrow(ctx, s);
}

void weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) {
  double sum = 0;
  if (compute == Num::f64) {
    for (std::int64_t i = 0; i < n; ++i) sum -= static_cast<double>(weights[i]) * static_cast<const double*>(logprob)[i];
    *static_cast<double*>(out) = sum;
  } else {
    for (std::int64_t i = 0; i < n; ++i) sum -= static_cast<double>(weights[i]) * static_cast<double>(static_cast<const float*>(logprob)[i]);
    *static_cast<float*>(out) = static_cast<float>(sum);
  }
}

}  // namespace capstan::kernels::cpu
