// defines: CpuBackend: the CPU kernels behind kernels/backend.h.
#pragma once
#include <kernels/backend.h>
#include <kernels/cpu/context.h>

namespace capstan::kernels::cpu {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(Context& context) : ctx_(context) {}

  void upload(void* to, const void* host_from, std::int64_t bytes) override;
  void download(void* host_to, const void* from, std::int64_t bytes) override;
  void synchronize() override {}
  void clear(void* to, std::int64_t bytes) override;
  void copy(const Strided& shape, Num to_num, void* to, Num from_num, const void* from) override;
  void fill(const Strided& shape, Num num, void* to, double value) override;

  void binary(BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out) override;
  void unary(UnaryOp op, Num num, std::int64_t n, const void* x, void* y) override;
  void unary_backward(UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx) override;
  void gelu_backward_sum(Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* g, void* dx, Num sum_num, void* sum,
                         bool accumulate) override;
  void scale(Num num, std::int64_t n, const void* x, double factor, double shift, void* y) override;
  void add(Num num, std::int64_t n, const void* x, const void* y, void* out) override;
  void swiglu(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y) override;
  void swiglu_backward(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx) override;
  void dropout(Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p,
               std::uint64_t key, std::uint64_t step, void* y) override;
  void rope_table(Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table) override;
  void rope(Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride, const void* table,
            void* y, bool inverse) override;
  void random(Num num, const RandomFill& fill, std::int64_t n, void* to) override;

  void sum_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out) override;
  void spread_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out) override;
  void max_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out) override;
  void max_middle_backward(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m, const void* g,
                           void* da) override;
  void scan_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) override;
  void sum_flat(Num num, std::int64_t n, const void* a, void* out) override;
  void column_sum(Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* to,
                  bool accumulate) override;
  double sum_of_squares(std::span<const Piece> pieces) override;
  std::int64_t first_nonfinite(std::span<const Piece> pieces) override;
  std::uint64_t fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first) override;
  void normalize(Num num, std::int64_t n, void* x, double least) override;

  std::int64_t norm_blocks(std::int64_t rows, std::int64_t cols) override;
  void norm(Num num, const NormRows& n) override;
  void norm_backward(Num num, const NormRowsBackward& n) override;
  void softmax(Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) override;
  void softmax_backward(Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) override;

  std::int64_t first_outside(const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) override;
  void local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num, void* mine,
                 void* others) override;
  void gather_rows(std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out) override;
  void scatter_add_rows(Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g, std::int64_t table_rows,
                        Num table_num, void* table, bool overwrite) override;
  void store_pages(Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                   std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages) override;

  bool takes_gelu_slope(const Gemm& g) override;
  bool takes_sums_of_a(const Gemm& g) override;
  void gemm(const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual) override;
  double gemm_rate(Num num) override;
  void quantize(const Quantize& q) override;
  void gemm_fp8(const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual) override;
  std::string fp8_problem(Scaling) override { return ""; }
  void attention(const Attention& a) override;
  void attention_backward(const Attention& a) override;
  void attention_paged(const PagedAttention& a) override;
  void score_rows(const ScoreRows& s) override;
  void score_rows_backward(const ScoreRows& s) override;
  void weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) override;
  bool is_one(const char* what, Num num, const void* x) override;

  void adamw(const AdamWStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v) override;
  void sgd(const SgdStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer) override;
  void momentum(const MomentumStep& s, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                const void* grad, void* buffer, void* direction) override;
  void axpby(Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b, const void* y,
             std::int64_t y_stride, void* out, std::int64_t out_stride) override;

 private:
  Context& ctx_;
};

}  // namespace capstan::kernels::cpu
