// defines: Backend: the kernels of one device behind one interface; ops call it and know no device. Pointers are of
// the backend's own memory unless their name begins with host. Calls come from one thread at a time and run in order;
// a backend may return before its work is done (synchronize(), download() and functions that return values wait).
// `num` is f64, f32 or bf16 unless said otherwise; bf16 computes in f32. Sizes of 0 are allowed everywhere.
// What each kernel computes is said at the CPU's declaration of the same name (kernels/cpu/*.h), the specification.
#pragma once
#include <kernels/types.h>

#include <cstdint>
#include <span>
#include <string>

namespace capstan::kernels {

class Queue;

class Backend {
 public:
  virtual ~Backend() = default;
  /// Null where calls return when their work is done.
  virtual Queue* queue() { return nullptr; }

  // Memory.
  virtual void upload(void* to, const void* host_from, std::int64_t bytes) = 0;  ///< host_from may be reused at once
  virtual void download(void* host_to, const void* from, std::int64_t bytes) = 0;
  virtual void synchronize() = 0;
  virtual void clear(void* to, std::int64_t bytes) = 0;
  /// Any of f64, f32, bf16, i32, i64, u8, boolean on either side; overlap is not allowed.
  virtual void copy(const Strided& shape, Num to_num, void* to, Num from_num, const void* from) = 0;
  /// Every element that `shape` names on its `to` side.
  virtual void fill(const Strided& shape, Num num, void* to, double value) = 0;

  // Elements. Flat arrays of n.
  virtual void binary(BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out) = 0;
  virtual void unary(UnaryOp op, Num num, std::int64_t n, const void* x, void* y) = 0;
  /// dx = g * slope; `saved` is the output for exp and sqrt, the input for the others.
  virtual void unary_backward(UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx) = 0;
  /// unary_backward of gelu over [rows, cols], and the column_sum of dx into `sum`, in one pass where that pays.
  virtual void gelu_backward_sum(Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* g, void* dx, Num sum_num,
                                 void* sum, bool accumulate) = 0;
  virtual void scale(Num num, std::int64_t n, const void* x, double factor, double shift, void* y) = 0;  ///< fma
  /// out = x + y; out may be x.
  virtual void add(Num num, std::int64_t n, const void* x, const void* y, void* out) = 0;
  virtual void swiglu(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y) = 0;
  virtual void swiglu_backward(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx) = 0;
  virtual void dropout(Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p,
                       std::uint64_t key, std::uint64_t step, void* y) = 0;
  /// num: f32 or f64.
  virtual void rope_table(Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table) = 0;
  /// `table` in the compute type.
  virtual void rope(Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride,
                    const void* table, void* y, bool inverse) = 0;
  /// The same bits on every backend.
  virtual void random(Num num, const RandomFill& fill, std::int64_t n, void* to) = 0;

  // Reductions. Orders are fixed by the shape alone.
  /// a [outer, n, inner] of `num`, out of `out_num` (num or its compute type).
  virtual void sum_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out) = 0;
  virtual void spread_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out) = 0;
  virtual void max_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out) = 0;
  virtual void max_middle_backward(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m,
                                   const void* g, void* da) = 0;
  /// out[o, i, j] = the sum over k <= i (reverse: k >= i) of a[o, k, j]; a [outer, n, inner], sums in the compute type.
  virtual void scan_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) = 0;
  virtual void sum_flat(Num num, std::int64_t n, const void* a, void* out) = 0;  ///< one element of `num`
  /// to[c] (+)= sum_r from[r * stride + c]; `to` in to_num: num or its compute type.
  virtual void column_sum(Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* to, bool accumulate) = 0;
  /// Sum of squares over all pieces (f32 and f64), in f64; not finite when any element is not. Waits.
  virtual double sum_of_squares(std::span<const Piece> pieces) = 0;
  /// The index of the first piece with an element that is not finite, or -1. Waits.
  virtual std::int64_t first_nonfinite(std::span<const Piece> pieces) = 0;
  /// Tells tensors apart to the bit, the same on every backend; waits.
  virtual std::uint64_t fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first) = 0;
  /// x *= 1 / max(|x|, least) with the Frobenius norm in f64; f32 or f64.
  virtual void normalize(Num num, std::int64_t n, void* x, double least) = 0;

  // Norms. Weights and what is saved are in the compute type.
  /// Rows of the partial sums [blocks, cols] that the backwards write; ops add them by sum_middle.
  virtual std::int64_t norm_blocks(std::int64_t rows, std::int64_t cols) = 0;
  virtual void norm(Num num, const NormRows& n) = 0;
  virtual void norm_backward(Num num, const NormRowsBackward& n) = 0;
  virtual void softmax(Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) = 0;
  virtual void softmax_backward(Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) = 0;

  // Rows by id.
  /// The first index with ids[t] outside [low, high), or -1. A backend that would have to wait may return -1 and throw
  /// from a later call that waits, naming `what`; its kernels then do something with such ids that touches no other memory.
  virtual std::int64_t first_outside(const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) = 0;
  /// What ids of a whole table are in rows [begin, begin + rows) of it: local[t] = ids[t] - begin, or -1. `mine` and `others`
  /// (of num: f32, f64; null: not wanted): 1 where those rows have the id, and where other rows have it (it is not below 0).
  virtual void local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num,
                         void* mine, void* others) = 0;
  /// An id below 0 is nobody's, here and in scatter_add_rows: its row is zero, what it would add goes nowhere.
  virtual void gather_rows(std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out) = 0;
  virtual void scatter_add_rows(Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g,
                                std::int64_t table_rows, Num table_num, void* table, bool overwrite) = 0;
  /// pages[rows[t] / page, h, rows[t] % page, :] = from[t * row_stride + h * head_stride + ...]; size elements. A row below
  /// 0 is nobody's: nothing is stored.
  virtual void store_pages(Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                           std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages) = 0;

  // Products and what is built on them.
  /// bias [N] and residual [M, N] (rows ldc apart) in c's type, or null; with a residual g.accumulate is off.
  virtual void gemm(const Gemm& g, const void* a, const void* b, void* c, const void* bias = nullptr, const void* residual = nullptr) = 0;
  /// Whether gemm() takes GELU's slope as it stores C, and sums A as it reads it, in this product. Where it does not, it refuses
  /// g.gelu_slope_of and g.sums_of_a, and passes of their own are the faster way.
  virtual bool takes_gelu_slope(const Gemm& g) = 0;
  virtual bool takes_sums_of_a(const Gemm& g) = 0;
  /// FLOP/s of a large product of `num`, the best of a few: about 60 ms of work. f8e4m3: gemm_fp8 with one scale a matrix.
  virtual double gemm_rate(Num num) = 0;
  virtual void quantize(const Quantize& q) = 0;
  /// bias [N] and residual [M, N] (rows ldc apart) in c's type, or null; with a residual g.accumulate is off.
  virtual void gemm_fp8(const GemmFp8& g, const void* a, const void* b, void* c, const void* bias = nullptr, const void* residual = nullptr) = 0;
  /// Why gemm_fp8 cannot run here with scales of this kind, and what to do; "" when it can.
  virtual std::string fp8_problem(Scaling scaling) = 0;
  virtual void attention(const Attention& a) = 0;
  virtual void attention_backward(const Attention& a) = 0;
  virtual void attention_paged(const PagedAttention& a) = 0;
  virtual void score_rows(const ScoreRows& s) = 0;
  virtual void score_rows_backward(const ScoreRows& s) = 0;
  /// out (compute type, one element) = -sum_t weights[t] * logprob[t], in f64.
  virtual void weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) = 0;
  /// False when x is known to differ from 1. A backend that would have to wait returns true and throws later.
  virtual bool is_one(const char* what, Num num, const void* x) = 0;

  // Optimizers. Values and gradients f32 or f64, state `state_num` (f32, or f64 with f64 values).
  virtual void adamw(const AdamWStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v) = 0;
  virtual void sgd(const SgdStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer) = 0;
  /// A matrix whose rows are `stride` apart in grad and buffer; direction is contiguous.
  virtual void momentum(const MomentumStep& s, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                        const void* grad, void* buffer, void* direction) = 0;
  /// out = a x + b y (y null: a x), each row `*_stride` apart; out may be x or y.
  virtual void axpby(Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b,
                     const void* y, std::int64_t y_stride, void* out, std::int64_t out_stride) = 0;
};

}  // namespace capstan::kernels
