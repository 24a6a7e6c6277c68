// defines: the differentiable ops. Each checks its shapes, works on cpu and meta, and has its backward
// beside it in core/src/ops/<op>.cpp. T rows, C columns; sums in f32 (f64 for f64); errors: Error(programming)
// "[op] what: expected ..., got ...". Fused ops name the plain composition that is their specification.
#pragma once
#include <capstan/batch.h>
#include <capstan/parameter.h>
#include <capstan/random.h>
#include <capstan/state.h>
#include <capstan/tensor.h>

#include <span>
#include <utility>
#include <vector>

namespace capstan::ops {

// Plain ops, with NumPy's broadcasting where two shapes meet.
CAPSTAN_API Tensor add(const Tensor& a, const Tensor& b);
CAPSTAN_API Tensor sub(const Tensor& a, const Tensor& b);
CAPSTAN_API Tensor mul(const Tensor& a, const Tensor& b);
CAPSTAN_API Tensor div(const Tensor& a, const Tensor& b);
CAPSTAN_API Tensor scale(const Tensor& a, double factor, double shift = 0);  ///< a * factor + shift
CAPSTAN_API Tensor exp(const Tensor& a);
CAPSTAN_API Tensor log(const Tensor& a);
CAPSTAN_API Tensor sqrt(const Tensor& a);
CAPSTAN_API Tensor tanh(const Tensor& a);
CAPSTAN_API Tensor sigmoid(const Tensor& a);
CAPSTAN_API Tensor sum(const Tensor& a, int dim, bool keep = false);
CAPSTAN_API Tensor mean(const Tensor& a, int dim, bool keep = false);
CAPSTAN_API Tensor max(const Tensor& a, int dim, bool keep = false);         ///< gradient to the first maximum
CAPSTAN_API Tensor cumsum(const Tensor& a, int dim);                         ///< a[.., 0, ..] + ... + a[.., i, ..] at i
CAPSTAN_API Tensor sum_all(const Tensor& a);                                 ///< scalar, shape []
CAPSTAN_API Tensor softmax(const Tensor& a);                                 ///< over the last dimension
CAPSTAN_API Tensor log_softmax(const Tensor& a);
/// [..., M, K] x [..., K, N] with equal leading dimensions (or none on b).
CAPSTAN_API Tensor matmul(const Tensor& a, const Tensor& b);
CAPSTAN_API Tensor reshape(const Tensor& a, const Dims& shape);
CAPSTAN_API Tensor transpose(const Tensor& a, int d0, int d1);
CAPSTAN_API Tensor slice(const Tensor& a, int dim, std::int64_t begin, std::int64_t length);
/// Pieces of dimension 1 of a [T, sum of widths], as views (rows strided); its backward writes one gradient.
CAPSTAN_API std::vector<Tensor> split(const Tensor& a, std::span<const std::int64_t> widths);
CAPSTAN_API Tensor concat(std::span<const Tensor> parts, int dim);
/// Rows of a [N, ...] by i32 ids [M] -> [M, ...]; backward adds rows in order of M (deterministic).
CAPSTAN_API Tensor gather(const Tensor& a, const Tensor& ids);
CAPSTAN_API Tensor cast(const Tensor& a, DType dtype);

// Fused ops.
/// x [T, in] W[out, in]^T (+ bias [out]) (+ residual [T, out]). Spec: matmul(x, transpose(W)) + ...
CAPSTAN_API Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {}, const Tensor& residual = {});
/// gelu(x [T, in] W[out, in]^T (+ bias [out])), the tanh form. Spec: gelu(linear(x, W, bias)).
CAPSTAN_API Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias = {});
/// table [V, C] by i32 ids [T] -> [T, C]. Spec: gather.
CAPSTAN_API Tensor embedding(const Tensor& table, const Tensor& ids);
/// x / sqrt(mean(x^2) + eps) * w over the last dimension.
CAPSTAN_API Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon);
/// (x - mean) / sqrt(var + eps) * w (+ b) over the last dimension.
CAPSTAN_API Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon);
/// A sum and its norm: sum = x + residual, in x's element type, and y of it, each row read once. Without residual the sum is x
/// itself: what goes on with both (a block: x + f(norm(x))) then has its two gradients added as the norm's is stored. Spec: add,
/// then rms_norm or layer_norm.
struct NormOfSum { Tensor sum, y; };
CAPSTAN_API NormOfSum add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double epsilon);
CAPSTAN_API NormOfSum add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double epsilon);
/// 0.5 x (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, the tanh form).
CAPSTAN_API Tensor gelu(const Tensor& x);
/// x * sigmoid(x)
CAPSTAN_API Tensor silu(const Tensor& x);
/// gate_up [T, 2F] -> silu(gate_up[:, :F]) * gate_up[:, F:] (Shazeer 2020).
CAPSTAN_API Tensor swiglu(const Tensor& gate_up);
/// Rotates pairs (i, i + D/2) of each head of x [T, heads, D] by positions[t] * theta^(-2i/D) (Su et al.
/// 2021, the half-split layout of Llama and Qwen checkpoints). `table` comes from rope_table.
CAPSTAN_API Tensor rope(const Tensor& x, const Tensor& table);
/// cos and sin for positions i32 [T]: f32 [T, D] (D/2 cosines, then D/2 sines); f64 when asked.
CAPSTAN_API Tensor rope_table(const Tensor& positions, std::int64_t head_size, double theta, DType dtype);
/// Zeroes with probability p and scales the rest by 1/(1-p). Element (t, c) of stream `rng` has the index
/// sample_ids[t] * C + c, so that it does not depend on batch or mesh.
CAPSTAN_API Tensor dropout(const Tensor& x, double p, const Rng& rng, const Tensor& sample_ids);

struct AttentionShape {
  std::int64_t heads = 1, kv_heads = 1, head_size = 64;
  double scale = 0;         ///< 0: 1/sqrt(D)
  std::int64_t window = 0;  ///< keys that a row sees, its own and those just before it (Beltagy et al. 2020); 0: all before it
};
/// Causal attention inside each sequence of `space`: q [T, heads * D], k and v [T, kv_heads * D] -> [T, heads * D].
/// Head h reads key/value head h / (heads / kv_heads). Sums over keys run in fixed tiles of 64 counted from
/// the sequence's start (online softmax, Milakov & Gimelshein 2018; Dao et al. 2022), so a row's bits depend
/// on its own sequence only. No T x T matrix. q, k, v may be column slices of one fused tensor (rows strided).
CAPSTAN_API Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Space& space, const AttentionShape& shape);
/// The same over a paged past (inference, no gradient): query rows of sequence s are its last ones.
CAPSTAN_API Tensor attention_paged(const Tensor& q, const PagedKV& past, const Space& space, const AttentionShape& shape);

/// Per-token scores of targets i32 [T] under softmax(x W^T), in row chunks: see Head::score. `objective`
/// as there; its backward accepts only the gradient 1 (Error(programming) otherwise).
struct HeadScore { Tensor logprob, logsumexp, entropy, objective; };
CAPSTAN_API HeadScore linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor* weights, bool grad);

}  // namespace capstan::ops
