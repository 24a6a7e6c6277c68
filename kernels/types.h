// defines: Num, Gemm, Quantize, GemmFp8, BinaryOp, UnaryOp, Broadcast, Strided, NormRows, NormRowsBackward, Attention,
// PagedAttention, ScoreRows and the scalars of the optimizers' steps: what every backend is told, in plain pointers and numbers.
#pragma once
#include <capstan/kernels/bf16.h>

#include <cstdint>

namespace capstan::kernels {

/// Element types; the order is DType's.
enum class Num : std::uint8_t { f64, f32, bf16, f16, f8e4m3, f8e5m2, i32, i64, u8, boolean };

constexpr std::int64_t bytes_of(Num num) {
  switch (num) {
    case Num::f64:
    case Num::i64: return 8;
    case Num::f32:
    case Num::i32: return 4;
    case Num::bf16:
    case Num::f16: return 2;
    default: return 1;
  }
}
/// What sums run in.
constexpr Num compute_of_num(Num num) { return num == Num::f64 ? Num::f64 : Num::f32; }

/// C[M,N] = op(A)[M,K] op(B)[K,N] (+ bias[N]) (+ C when accumulate); `batch` products `stride_*` elements
/// apart. Row-major; lda is the row stride of A as stored ([M,K], or [K,M] when trans_a). Sums in f32 (f64).
/// A row of C has the same bits whatever M is and however many threads run, when `invariant` is set
/// (forward products); gradients leave it off and take the fastest path.
struct Gemm {
  Num a = Num::f32, b = Num::f32, c = Num::f32;
  bool trans_a = false, trans_b = false;
  std::int64_t m = 0, n = 0, k = 0, lda = 0, ldb = 0, ldc = 0;
  std::int64_t batch = 1, stride_a = 0, stride_b = 0, stride_c = 0;
  bool accumulate = false;
  bool bias = false;  ///< f32 (f64 in f64 products) on the CPU; Backend::gemm takes c's type
  bool invariant = false;
  /// Not null (one product, nothing added to it but a bias): what the product comes to goes here, in c's type, rows ldc apart,
  /// and C is its GELU.
  void* before_gelu = nullptr;
  /// Not null (one product, nothing added to it): C is the product times GELU's slope at these values of c's type, rows ldc apart.
  const void* gelu_slope_of = nullptr;
  /// Not null (one product, A transposed): the sums over k of A's columns, [m] in c's type, added to what is there if C is.
  void* sums_of_a = nullptr;
};

/// What one scale of an fp8 matrix covers: all of it, or 32 neighbours along what a product sums over (shared/fp8.h).
enum class Scaling : std::uint8_t { tensor, block };

/// A matrix x [rows, cols] of f32 or bf16, rows `stride` apart, to e4m3 or e5m2; cols a multiple of 16 (tensor) or 32 (block).
/// Results lie as fp8_places() says; null: not wanted. All on 16 bytes.
struct Quantize {
  Num from = Num::bf16, to = Num::f8e4m3;
  Scaling scaling = Scaling::tensor;
  std::int64_t rows = 0, cols = 0, stride = 0;
  const void* x = nullptr;
  void *data = nullptr, *scale = nullptr;           ///< [rows, cols]; its scales: with Scaling::tensor always wanted
  void *turned = nullptr, *turned_scale = nullptr;  ///< [cols, rows padded with zeros to 16 or 32]; its scales under Scaling::block
};

/// C[M,N] = A[M,K] B[N,K]^T, A and B in fp8 with their scales, rows K elements long; sums in f32, c f32 or bf16. K is a multiple
/// of 16 (tensor) or 32 (block), N of 16; not both of A and B are e5m2.
struct GemmFp8 {
  Num a = Num::f8e4m3, b = Num::f8e4m3, c = Num::bf16;
  Scaling scaling = Scaling::tensor;
  std::int64_t m = 0, n = 0, k = 0, ldc = 0;
  const void *a_scale = nullptr, *b_scale = nullptr;
  bool accumulate = false;  ///< C is added to
};

enum class BinaryOp : std::uint8_t { add, sub, mul, div };
enum class UnaryOp : std::uint8_t { exp, log, sqrt, tanh, sigmoid, gelu, silu };

/// The output's shape and, per dimension, the step of each operand in elements (0 where it is repeated).
struct Broadcast {
  int rank = 0;
  std::int64_t shape[6] = {}, a[6] = {}, b[6] = {};
};

/// A copy's shape and, per dimension, the steps of both sides in elements.
struct Strided {
  int rank = 0;
  std::int64_t shape[6] = {}, to[6] = {}, from[6] = {};
};

/// Rows x [rows, cols] normalized: y = (x - mean) r w + b with r = 1 / sqrt(var + epsilon) where `centre` is set (LayerNorm), else
/// y = x r w with r = 1 / sqrt(mean(x^2) + epsilon) (RMSNorm). w, b, mean and inverse are in the compute type.
struct NormRows {
  bool centre = false;
  std::int64_t rows = 0, cols = 0;
  double epsilon = 0;
  const void *x = nullptr, *w = nullptr, *b = nullptr;  ///< b: with `centre`; null: none
  /// Not null: x + residual, rounded, goes to `sum`, and that is what is normalized. `sum` overlaps neither.
  const void* residual = nullptr;
  void* sum = nullptr;
  void *y = nullptr, *mean = nullptr, *inverse = nullptr;  ///< mean [rows] with `centre`; inverse [rows]: r
};

/// dx = r (g w - x^ mean(g w x^)), with `centre` less r mean(g w); x^ is (x - mean) r or x r, x what was normalized.
struct NormRowsBackward {
  bool centre = false;
  std::int64_t rows = 0, cols = 0;
  const void *x = nullptr, *w = nullptr, *mean = nullptr, *inverse = nullptr, *g = nullptr;
  const void* g_sum = nullptr;  ///< not null: added to dx ahead of its rounding
  /// Null: not wanted. Sums over fixed blocks of rows (Backend::norm_blocks) of g x^ and, with `centre`, of g: [blocks, cols].
  void *dx = nullptr, *partial_w = nullptr, *partial_b = nullptr;
};

/// Causal attention over ragged sequences, over the last `window` keys if that is above 0: the row at position i of its
/// sequence sees keys max(0, i - window + 1) .. i. Rows t of q, k, v, out, dout, dq and d(k, v) are `*_stride` elements
/// apart; head h starts at column h * head_size; query head h reads key/value head h / (heads / kv_heads).
/// Sequence s has rows [starts[s], starts[s + 1]); rows past the last belong to nobody: out, dq, dk, dv are 0 there.
struct Attention {
  Num num = Num::f32;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* out = nullptr;
  std::int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0;
  std::int64_t heads = 0, kv_heads = 0, head_size = 0, window = 0;
  double scale = 1;
  /// [sequences + 1]; null (CUDA): the launch must serve other `starts` too, of as many sequences, which use all rows and
  /// none of which is longer than `longest`.
  const std::int32_t* host_starts = nullptr;
  const std::int32_t* starts = nullptr;         ///< the same on the device
  std::int64_t sequences = 0, rows = 0, longest = 0;
  /// Not null: the rows of sequence s are the last ones of keys and values [host_key_begins[s], + host_key_counts[s]) of
  /// k and v, which have rows of their own. Sequences that begin at the same key are neighbours, the one with the fewest
  /// keys first. dk and dv add up over them; rows of keys that nobody sees keep what they had. `longest` stays that of the rows.
  const std::int32_t *host_key_begins = nullptr, *host_key_counts = nullptr;
  void* lse = nullptr;  ///< log-sum-exp of each row's scaled scores, [heads, rows], compute type; null: not kept
  // Backward:
  bool any_order = false;  ///< sums may run in another order at every run, where that is faster; off: the same bits always
  const void* dout = nullptr;
  std::int64_t dout_stride = 0;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  std::int64_t dq_stride = 0, dkv_stride = 0;
};

/// Keys and values in pages: [pages, kv_heads, page, head_size]. The rows of sequence s are its last
/// starts[s + 1] - starts[s] tokens; it holds lengths[s] in all, token i in page blocks[s * blocks_stride + i / page].
/// `window` as for Attention; pages outside every row's window are not read.
struct PagedAttention {
  Num num = Num::f32;
  const void* q = nullptr;
  void* out = nullptr;
  std::int64_t q_stride = 0, out_stride = 0, page = 64;
  const void *k_pages = nullptr, *v_pages = nullptr;
  const std::int32_t *blocks = nullptr, *lengths = nullptr;  ///< on the device
  /// host_starts null (CUDA): the launch must serve other `starts` of as many sequences too; what rows past the last one
  /// get is then undefined.
  const std::int32_t *host_starts = nullptr, *starts = nullptr;
  std::int64_t blocks_stride = 0, sequences = 0, rows = 0;
  std::int64_t heads = 0, kv_heads = 0, head_size = 0, window = 0;
  double scale = 1;
};

/// Scores of some rows of logits [rows, cols], `stride` elements apart, in the compute type (f32 or f64). All
/// pointers are those of the first of these rows. target -1: none, its log-probability is 0.
struct ScoreRows {
  Num compute = Num::f32;
  std::int64_t rows = 0, cols = 0, stride = 0;
  void* logits = nullptr;
  const std::int32_t* targets = nullptr;
  void *logprob = nullptr, *logsumexp = nullptr, *entropy = nullptr;
  /// Not null: leaves -weights[t] * d logprob[t] / d logits in place of the logits.
  const float* weights = nullptr;
  /// Not null: the gradient goes here instead (bf16, the same stride), and the logits' contents are undefined after.
  void* narrow = nullptr;
  // score_rows_backward reads logsumexp and entropy and the gradients of the three (null: zero), and leaves the
  // gradient of the logits in their place (or in `narrow`).
  const void *g_logprob = nullptr, *g_logsumexp = nullptr, *g_entropy = nullptr;
};

/// Numbers of one step of AdamW, the same for every element:
///   m' = m + beta1_rest (g - m),  v' = beta2 v + beta2_rest g^2,  g = grad * grad_scale
///   p' = keep p - rate m' / (sqrt(v') v_scale + epsilon)
struct AdamWStep { double grad_scale = 1, keep = 1, rate = 0, beta1_rest = 0, beta2 = 0, beta2_rest = 0, v_scale = 1, epsilon = 0; };

/// g' = g grad_scale + decay p,  b' = momentum b + g',  p' = p - lr (nesterov ? g' + momentum b' : b'); without a
/// buffer p' = p - lr g'.
struct SgdStep { double grad_scale = 1, decay = 0, momentum = 0, lr = 0; bool nesterov = false; };

/// b' = mu b + (1 - mu) g,  d = nesterov ? (1 - mu) g + mu b' : b',  g = grad * grad_scale
struct MomentumStep { double grad_scale = 1, mu = 0; bool nesterov = false; };

/// Elements [begin, begin + n) of a random stream, times scale: normals, or uniforms in (-1, 1).
struct RandomFill { std::uint64_t key = 0, step = 0, begin = 0; bool normal = true; double scale = 1; };

/// A run of elements that a reduction over many buffers reads.
struct Piece { Num num = Num::f32; const void* data = nullptr; std::int64_t count = 0; };

}  // namespace capstan::kernels
