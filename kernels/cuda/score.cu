// Scores of rows of logits: log-probability, log-sum-exp, entropy and the gradient in place. A cluster of blocks takes a
// row, each block a slice that stays in shared memory between the two passes: logits are read once and written once,
// however wide the vocabulary is (up to 8 x 53,000 columns in f32; the rest of longer rows is read again).
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/grid_plan.h>
#include <kernels/cuda/rows.h>

#include <cooperative_groups.h>

#include <algorithm>

namespace capstan::kernels::cuda {

namespace {

namespace cg = cooperative_groups;

/// Of some logits: their maximum, the sum of e^(x - max), and that of e^(x - max) (x - max).
template <class A>
struct Score { A max, sum, dot; };

template <class A>
__device__ __forceinline__ Score<A> join(const Score<A>& a, const Score<A>& b) {
  const A m = Max{}(a.max, b.max);
  if (m == lowest<A>()) return a;
  const A da = a.max - m, db = b.max - m;
  const A fa = a.sum > A(0) ? exp_of(da) : A(0), fb = b.sum > A(0) ? exp_of(db) : A(0);
  // sum of e^(x - m) (x - m) = f (dot + (max - m) sum); what is empty adds nothing.
  return {m, a.sum * fa + b.sum * fb, (fa > A(0) ? fa * (a.dot + da * a.sum) : A(0)) + (fb > A(0) ? fb * (b.dot + db * b.sum) : A(0))};
}

template <class A, int N>
__device__ __forceinline__ void take(Score<A>& s, const A (&x)[N]) {
  A m = s.max;
#pragma unroll
  for (int i = 0; i < N; ++i) m = Max{}(m, x[i]);
  if (m == lowest<A>()) return;  // nothing but minus infinity so far
  if (m > s.max) {
    if (s.sum > A(0)) {
      const A d = s.max - m, f = exp_of(d);
      s.dot = f > A(0) ? f * (s.dot + d * s.sum) : A(0);
      s.sum *= f;
    }
    s.max = m;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A d = x[i] - m, e = exp_of(d);
    s.sum += e;
    s.dot += e > A(0) ? e * d : A(0);  // 0 times -inf counts as 0
  }
}

template <class A, int Width, int Threads>
__global__ void __launch_bounds__(Threads, sizeof(A) == 8 ? 1 : 3) score_kernel(ScoreRows s, int slice, int cached) {
  A* held = reinterpret_cast<A*>(dynamic_shared());
  __shared__ Score<A> warps[Threads / 32];
  __shared__ Score<A> mine;
  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const std::int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  A* logits = static_cast<A*>(s.logits) + row * s.stride;
  const int begin = min(rank * slice, static_cast<int>(s.cols)), count = min(slice, static_cast<int>(s.cols) - begin);
  const bool keep = s.weights != nullptr;
  A* from = logits + begin;
  const std::int32_t target = s.targets[row];

  Score<A> score{lowest<A>(), A(0), A(0)};
  constexpr int ahead = 4, step = Threads * Width;
  for (int c0 = static_cast<int>(threadIdx.x) * Width; c0 < count; c0 += step * ahead) {
    Pack<A, Width> x[ahead];
#pragma unroll
    for (int a = 0; a < ahead; ++a)
      if (c0 + a * step + Width <= count) x[a] = load_pack_once<A, Width>(from + c0 + a * step);
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      const int c = c0 + a * step;
      if (c + Width > count) continue;
      if (c + Width <= cached) *reinterpret_cast<Pack<A, Width>*>(held + c) = x[a];
      take<A, Width>(score, x[a].v);
    }
  }
  const int whole = count / Width * Width;
  if (whole + static_cast<int>(threadIdx.x) < count) {  // fewer than Width are left
    const A x[1] = {from[whole + threadIdx.x]};
    take<A, 1>(score, x);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) {
    Score<A> other;
    other.max = __shfl_xor_sync(0xffffffffu, score.max, lane);
    other.sum = __shfl_xor_sync(0xffffffffu, score.sum, lane);
    other.dot = __shfl_xor_sync(0xffffffffu, score.dot, lane);
    // The lower lane's part comes first, so that all lanes get the same bits.
    score = (threadIdx.x & static_cast<unsigned>(lane)) == 0 ? join(score, other) : join(other, score);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = score;
  __syncthreads();
  score = warps[0];
#pragma unroll 1
  for (int w = 1; w < Threads / 32; ++w) score = join(score, warps[w]);
  if (blocks > 1) {
    if (threadIdx.x == 0) mine = score;
    cluster.sync();
    score = *cluster.map_shared_rank(&mine, 0);
#pragma unroll 1
    for (int b = 1; b < blocks; ++b) score = join(score, *cluster.map_shared_rank(&mine, b));
    // Nobody may leave while another still reads its part.
    cg::this_cluster().barrier_arrive();
  }
  const A log_sum = log_of(score.sum), lse = score.max + log_sum;
  const bool chosen = target >= begin && target < begin + count;
  if (chosen && threadIdx.x == 0) static_cast<A*>(s.logprob)[row] = from[target - begin] - lse;
  if (rank == 0 && threadIdx.x == 0) {
    if (target < 0 || target >= s.cols) static_cast<A*>(s.logprob)[row] = A(0);
    static_cast<A*>(s.logsumexp)[row] = lse;
    static_cast<A*>(s.entropy)[row] = log_sum - score.dot / score.sum;
  }
  if (keep) {
    __syncthreads();  // the target's logit is read before it is overwritten
    const A w = target >= 0 ? static_cast<A>(s.weights[row]) : A(0);
    const int at = target - begin;
    bf16* small = s.narrow == nullptr ? nullptr : static_cast<bf16*>(s.narrow) + row * s.stride + begin;
    const auto slope = [&](A x, int c) { return w * exp_of(x - lse) - (c == at ? w : A(0)); };
    for (int c = static_cast<int>(threadIdx.x) * Width; c + Width <= count; c += step) {
      const Pack<A, Width> x = c + Width <= cached ? *reinterpret_cast<const Pack<A, Width>*>(held + c) : load_pack_once<A, Width>(from + c);
      A out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) out[i] = slope(x.v[i], c + i);
      if (small == nullptr) {
        store_pack<A, Width>(from + c, out);
      } else {
        float f[Width];
#pragma unroll
        for (int i = 0; i < Width; ++i) f[i] = static_cast<float>(out[i]);
        store_pack<bf16, Width>(small + c, f);
      }
    }
    if (whole + static_cast<int>(threadIdx.x) < count) {
      const int c = whole + static_cast<int>(threadIdx.x);
      const A out = slope(from[c], c);
      if (small == nullptr) from[c] = out;
      else small[c] = narrow<bf16>(static_cast<float>(out));
    }
  }
  if (blocks > 1) cg::this_cluster().barrier_wait();
}

/// dlogit_j = g_logprob (1[j = target] - p_j) + g_lse p_j - g_entropy p_j (log p_j + H).
template <class A, int Width>
__global__ void __launch_bounds__(512, 2) score_backward_kernel(ScoreRows s) {
  const std::int64_t row = blockIdx.x;
  const std::int32_t target = s.targets[row];
  const auto gradient = [&](const void* g) { return g == nullptr ? A(0) : static_cast<const A*>(g)[row]; };
  const A lp = target >= 0 ? gradient(s.g_logprob) : A(0), ls = gradient(s.g_logsumexp), en = gradient(s.g_entropy);
  const A lse = static_cast<const A*>(s.logsumexp)[row], h = static_cast<const A*>(s.entropy)[row];
  A* logits = static_cast<A*>(s.logits) + row * s.stride;
  bf16* small = s.narrow == nullptr ? nullptr : static_cast<bf16*>(s.narrow) + row * s.stride;
  for (int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * Width; c < s.cols; c += static_cast<int>(gridDim.y * blockDim.x) * Width) {
    A out[Width];
    load_wide<A, Width>(logits + c, out);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const A log_p = out[i] - lse, p = exp_of(log_p);
      out[i] = p * (ls - lp) - (p > A(0) ? en * p * (log_p + h) : A(0)) + (c + i == target ? lp : A(0));
    }
    if (small == nullptr) {
      store_pack<A, Width>(logits + c, out);
    } else {
      float f[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) f[i] = static_cast<float>(out[i]);
      store_pack<bf16, Width>(small + c, f);
    }
  }
}

/// One block: every thread adds its share in order, then the threads in a fixed tree.
template <class A>
__global__ void __launch_bounds__(1024) weighted_sum_kernel(std::int64_t n, const float* __restrict__ weights, const A* __restrict__ logprob, A* out) {
  __shared__ double room[32];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += static_cast<double>(weights[i]) * static_cast<double>(logprob[i]);
  sum = block_reduce(sum, Sum{}, room);
  if (threadIdx.x == 0) *out = static_cast<A>(-sum);
}

}  // namespace

void score_rows(Context& ctx, const ScoreRows& s) {
  if (s.rows == 0 || s.cols == 0) return;
  const auto run = [&]<class A>() {
    constexpr int wide = 16 / static_cast<int>(sizeof(A)), threads = 512;
    const ScorePlan plan = plan_scores(s.cols, sizeof(A), s.weights != nullptr);
    const bool vector = s.stride % 8 == 0 && all_on_16(s.logits, s.narrow);
    auto* kernel = vector ? score_kernel<A, wide, threads> : score_kernel<A, 1, threads>;
    const Blocks blocks = checked("score_rows", score_blocks(s.rows, plan.cluster));
    launch_clusters(ctx, "score_rows", kernel, plan.cluster, dim3(static_cast<unsigned>(blocks.x)), dim3(threads), plan.shared_bytes, s,
                    static_cast<int>(plan.slice), static_cast<int>(plan.cached));
  };
  if (s.compute == Num::f64) run.template operator()<double>();
  else run.template operator()<float>();
}

void score_rows_backward(Context& ctx, const ScoreRows& s) {
  if (s.rows == 0 || s.cols == 0) return;
  const auto run = [&]<class A>() {
    constexpr int wide = 16 / static_cast<int>(sizeof(A));
    const bool vector = s.stride % 8 == 0 && s.cols % wide == 0 && all_on_16(s.logits, s.narrow);
    const std::int64_t packs = ceil_div(s.cols, vector ? wide : 1);
    const Blocks blocks = checked("score_rows_backward", score_backward_blocks(s.rows, packs));
    const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
    if (vector) launch_block(ctx, "score_rows_backward", score_backward_kernel<A, wide>, grid, dim3(512), 0, s);
    else launch_block(ctx, "score_rows_backward", score_backward_kernel<A, 1>, grid, dim3(512), 0, s);
  };
  if (s.compute == Num::f64) run.template operator()<double>();
  else run.template operator()<float>();
}

void weighted_sum(Context& ctx, Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) {
  if (compute == Num::f64)
    launch_block(ctx, "weighted_sum", weighted_sum_kernel<double>, dim3(1), dim3(1024), 0, n, weights, static_cast<const double*>(logprob), static_cast<double*>(out));
  else
    launch_block(ctx, "weighted_sum", weighted_sum_kernel<float>, dim3(1), dim3(1024), 0, n, weights, static_cast<const float*>(logprob), static_cast<float*>(out));
}

}  // namespace capstan::kernels::cuda
