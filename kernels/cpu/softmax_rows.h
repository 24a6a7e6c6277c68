// defines: score_row(): one row of logits to log-sum-exp, entropy and, in place, softmax; for the language
// model head.
#pragma once
#include <kernels/cpu/simd.h>

#include <cmath>
#include <cstdint>

namespace capstan::kernels::cpu {

template <class A>
struct RowScore { A max, sum, logsumexp, entropy; };

/// Reads n logits; `keep` replaces them by exp(x - max). entropy = log(sum) - sum(e (x - max)) / sum.
template <class A>
RowScore<A> score_row(A* x, std::int64_t n, bool keep) {
  using V = Vec<A>;
  constexpr int lanes = V::lanes;
  const A lowest = -std::numeric_limits<A>::infinity();
  V a(lowest), b(lowest), c(lowest), d(lowest);
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = max(a, V::load(x + i)), b = max(b, V::load(x + i + lanes));
    c = max(c, V::load(x + i + 2 * lanes)), d = max(d, V::load(x + i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) a = max(a, V::load(x + i));
  if (i < n) a = max(a, V::load_partial(x + i, static_cast<int>(n - i), lowest));
  const A m = reduce_max(max(max(a, b), max(c, d)));
  V sum0(A(0)), sum1(A(0)), dot0(A(0)), dot1(A(0));
  auto block = [&](std::int64_t at, V& sum, V& dot, auto mask) {
    V y = V::load(x + at, mask) - V(m);
    V e = exp_flushed(y);
    if constexpr (std::is_same_v<decltype(mask), Part>) {  // lanes past the row count as nothing
      A tail[lanes];
      e.store(tail);
      for (int l = mask.n; l < lanes; ++l) tail[l] = A(0);
      e = V::load(tail);
    }
    sum = sum + e;
    dot = dot + select(e > V(A(0)), e * y, V(A(0)));  // 0 * -inf counts as 0
    if (keep) e.store(x + at, mask);
  };
  for (i = 0; i + 2 * lanes <= n; i += 2 * lanes) block(i, sum0, dot0, Full{}), block(i + lanes, sum1, dot1, Full{});
  for (; i + lanes <= n; i += lanes) block(i, sum0, dot0, Full{});
  if (i < n) block(i, sum1, dot1, Part{static_cast<int>(n - i)});
  RowScore<A> r;
  r.max = m, r.sum = reduce_add(sum0 + sum1);
  const A log_sum = std::log(r.sum);
  r.logsumexp = m + log_sum;
  r.entropy = log_sum - reduce_add(dot0 + dot1) / r.sum;
  return r;
}

/// x[i] *= factor over a row.
template <class A>
void scale_row(A* x, std::int64_t n, A factor) {
  for_blocks<A>(n, [&](std::int64_t i, auto m) { (Vec<A>::load(x + i, m) * Vec<A>(factor)).store(x + i, m); });
}

}  // namespace capstan::kernels::cpu
