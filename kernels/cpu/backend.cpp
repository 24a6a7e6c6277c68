// The CPU kernels by element type: each call picks the template's instance.
#include <kernels/cpu/backend.h>

#include <kernels/cpu/activation.h>
#include <kernels/cpu/attention.h>
#include <kernels/cpu/binary.h>
#include <kernels/cpu/column_sum.h>
#include <kernels/cpu/copy.h>
#include <kernels/cpu/dropout.h>
#include <kernels/cpu/elementwise.h>
#include <kernels/cpu/embedding.h>
#include <kernels/cpu/fingerprint.h>
#include <kernels/cpu/fp8.h>
#include <kernels/cpu/gemm.h>
#include <kernels/cpu/norm.h>
#include <kernels/cpu/optimizer.h>
#include <kernels/cpu/panel_gemm.h>
#include <kernels/cpu/random.h>
#include <kernels/cpu/reduce.h>
#include <kernels/cpu/rope.h>
#include <kernels/cpu/score.h>
#include <kernels/cpu/softmax.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

/// Calls f.operator()<T>() with double, float or bf16.
template <class F>
decltype(auto) visit(Num num, F&& f) {
  switch (num) {
    case Num::f64: return f.template operator()<double>();
    case Num::f32: return f.template operator()<float>();
    case Num::bf16: return f.template operator()<bf16>();
    default: throw std::invalid_argument("[cpu kernels] element type: expected f64, f32 or bf16, got number " + std::to_string(static_cast<int>(num)));
  }
}

/// Values and state of an optimizer.
template <class F>
void visit_state(Num num, Num state, F&& f) {
  if (num == Num::f32 && state == Num::f32) f.template operator()<float, float>();
  else if (num == Num::f64 && state == Num::f64) f.template operator()<double, double>();
  else if (num == Num::f64 && state == Num::f32) f.template operator()<double, float>();
  else throw std::invalid_argument("[cpu kernels] optimizers take f32 values with f32 state, or f64 values with f32 or f64 state");
}

template <class T> T* to(void* p) { return static_cast<T*>(p); }
template <class T> const T* to(const void* p) { return static_cast<const T*>(p); }

}  // namespace

void CpuBackend::upload(void* target, const void* from, std::int64_t bytes) { std::memcpy(target, from, static_cast<std::size_t>(bytes)); }
void CpuBackend::download(void* target, const void* from, std::int64_t bytes) { std::memcpy(target, from, static_cast<std::size_t>(bytes)); }
void CpuBackend::clear(void* target, std::int64_t bytes) { std::memset(target, 0, static_cast<std::size_t>(bytes)); }
void CpuBackend::copy(const Strided& shape, Num to_num, void* target, Num from_num, const void* from) { cpu::copy(ctx_, shape, to_num, target, from_num, from); }
void CpuBackend::fill(const Strided& shape, Num num, void* target, double value) { cpu::fill(ctx_, shape, num, target, value); }

void CpuBackend::binary(BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out) {
  visit(num, [&]<class T>() { cpu::binary(ctx_, op, shape, to<T>(a), to<T>(b), to<T>(out)); });
}

void CpuBackend::unary(UnaryOp op, Num num, std::int64_t n, const void* x, void* y) {
  visit(num, [&]<class T>() {
    const auto map = [&](auto f) { map1(ctx_, n, to<T>(x), to<T>(y), f); };
    switch (op) {
      case UnaryOp::exp: return map([](auto v) { return exp(v); });
      case UnaryOp::log: return map([](auto v) { return log(v); });
      case UnaryOp::sqrt: return map([](auto v) { return sqrt(v); });
      case UnaryOp::tanh: return map([](auto v) { return tanh(v); });
      case UnaryOp::sigmoid: return map([](auto v) { return sigmoid(v); });
      case UnaryOp::gelu: return cpu::gelu(ctx_, n, to<T>(x), to<T>(y));
      case UnaryOp::silu: return cpu::silu(ctx_, n, to<T>(x), to<T>(y));
    }
  });
}

void CpuBackend::unary_backward(UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx) {
  visit(num, [&]<class T>() {
    const auto map = [&](auto slope) {
      map2(ctx_, n, to<T>(g), to<T>(saved), to<T>(dx), [slope](auto grad, auto v) { return grad * slope(v); });
    };
    switch (op) {
      case UnaryOp::exp: return map([](auto y) { return y; });
      case UnaryOp::log: return map([](auto x) { return log_slope(x); });
      case UnaryOp::sqrt: return map([](auto y) { return sqrt_slope(y); });
      case UnaryOp::tanh: return map([](auto x) { return tanh_slope(x); });
      case UnaryOp::sigmoid: return map([](auto x) { return sigmoid_slope(x); });
      case UnaryOp::gelu: return cpu::gelu_backward(ctx_, n, to<T>(saved), to<T>(g), to<T>(dx));
      case UnaryOp::silu: return cpu::silu_backward(ctx_, n, to<T>(saved), to<T>(g), to<T>(dx));
    }
  });
}

void CpuBackend::scale(Num num, std::int64_t n, const void* x, double factor, double shift, void* y) {
  visit(num, [&]<class T>() {
    map1(ctx_, n, to<T>(x), to<T>(y), [factor, shift](auto v) { return fma(v, constant<decltype(v)>(factor), constant<decltype(v)>(shift)); });
  });
}

void CpuBackend::add(Num num, std::int64_t n, const void* x, const void* y, void* out) {
  visit(num, [&]<class T>() {
    const T *a = to<T>(x), *b = to<T>(y);
    T* sum = to<T>(out);
#pragma omp parallel for simd num_threads(ctx_.threads()) if (n > 65536)
    for (std::int64_t i = 0; i < n; ++i) sum[i] = T(a[i] + b[i]);
  });
}

void CpuBackend::swiglu(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y) {
  visit(num, [&]<class T>() { cpu::swiglu(ctx_, rows, width, to<T>(gate_up), to<T>(y)); });
}
void CpuBackend::swiglu_backward(Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx) {
  visit(num, [&]<class T>() { cpu::swiglu_backward(ctx_, rows, width, to<T>(gate_up), to<T>(g), to<T>(dx)); });
}
void CpuBackend::dropout(Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p,
                         std::uint64_t key, std::uint64_t step, void* y) {
  visit(num, [&]<class T>() { cpu::dropout(ctx_, rows, cols, to<T>(x), sample_ids, p, key, step, to<T>(y)); });
}
void CpuBackend::rope_table(Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table) {
  if (num == Num::f64) cpu::rope_table(ctx_, rows, size, theta, positions, to<double>(table));
  else cpu::rope_table(ctx_, rows, size, theta, positions, to<float>(table));
}
void CpuBackend::rope(Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride,
                      const void* table, void* y, bool inverse) {
  visit(num, [&]<class T>() { cpu::rope(ctx_, rows, heads, size, to<T>(x), stride, to<Compute<T>>(table), to<T>(y), inverse); });
}
void CpuBackend::random(Num num, const RandomFill& fill, std::int64_t n, void* target) {
  visit(num, [&]<class T>() { cpu::random(ctx_, fill, n, to<T>(target)); });
}

void CpuBackend::sum_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out) {
  visit(num, [&]<class T>() {
    const auto f = static_cast<Compute<T>>(factor);
    if (out_num == num) cpu::sum_middle(ctx_, outer, n, inner, to<T>(a), f, to<T>(out));
    else cpu::sum_middle(ctx_, outer, n, inner, to<T>(a), f, to<Compute<T>>(out));
  });
}
void CpuBackend::spread_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out) {
  visit(num, [&]<class T>() { cpu::spread_middle(ctx_, outer, n, inner, to<T>(g), static_cast<Compute<T>>(factor), to<T>(out)); });
}
void CpuBackend::max_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out) {
  visit(num, [&]<class T>() { cpu::max_middle(ctx_, outer, n, inner, to<T>(a), to<T>(out)); });
}
void CpuBackend::max_middle_backward(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m,
                                     const void* g, void* da) {
  visit(num, [&]<class T>() { cpu::max_middle_backward(ctx_, outer, n, inner, to<T>(a), to<T>(m), to<T>(g), to<T>(da)); });
}
void CpuBackend::scan_middle(Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) {
  visit(num, [&]<class T>() { cpu::scan_middle(ctx_, outer, n, inner, to<T>(a), reverse, to<T>(out)); });
}
void CpuBackend::sum_flat(Num num, std::int64_t n, const void* a, void* out) {
  visit(num, [&]<class T>() { *to<T>(out) = T(cpu::sum_flat(ctx_, n, to<T>(a))); });
}
void CpuBackend::column_sum(Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* target,
                            bool accumulate) {
  visit(num, [&]<class T>() {
    if (to_num != compute_of_num(num)) throw std::invalid_argument("[column_sum] sums are kept in the compute type");
    cpu::column_sum(ctx_, to<T>(from), rows, cols, stride, to<Compute<T>>(target), accumulate);
  });
}
void CpuBackend::gelu_backward_sum(Num num, std::int64_t rows, std::int64_t cols, const void* x, const void* g, void* dx, Num sum_num,
                                   void* sum, bool accumulate) {
  visit(num, [&]<class T>() {
    if (sum_num != compute_of_num(num)) throw std::invalid_argument("[gelu_backward_sum] sums are kept in the compute type");
    cpu::gelu_backward_sum(ctx_, rows, cols, to<T>(x), to<T>(g), to<T>(dx), to<Compute<T>>(sum), accumulate);
  });
}
double CpuBackend::sum_of_squares(std::span<const Piece> pieces) { return cpu::sum_of_squares(ctx_, pieces); }
std::int64_t CpuBackend::first_nonfinite(std::span<const Piece> pieces) { return cpu::first_nonfinite(ctx_, pieces); }
std::uint64_t CpuBackend::fingerprint(Num num, std::int64_t n, const void* data, std::uint64_t first) { return cpu::fingerprint(num, n, data, first); }
void CpuBackend::normalize(Num num, std::int64_t n, void* x, double least) {
  if (num == Num::f64) cpu::normalize(ctx_, n, to<double>(x), least);
  else cpu::normalize(ctx_, n, to<float>(x), least);
}

std::int64_t CpuBackend::norm_blocks(std::int64_t rows, std::int64_t) {
  const std::int64_t block = norm_block_rows(rows);
  return (rows + block - 1) / block;
}
void CpuBackend::norm(Num num, const NormRows& n) {
  visit(num, [&]<class T>() { cpu::norm<T>(ctx_, n); });
}
void CpuBackend::norm_backward(Num num, const NormRowsBackward& n) {
  visit(num, [&]<class T>() { cpu::norm_backward<T>(ctx_, n); });
}
void CpuBackend::softmax(Num num, std::int64_t rows, std::int64_t cols, const void* x, void* y, bool logarithm) {
  visit(num, [&]<class T>() { cpu::softmax(ctx_, rows, cols, to<T>(x), to<T>(y), logarithm); });
}
void CpuBackend::softmax_backward(Num num, std::int64_t rows, std::int64_t cols, const void* y, const void* g, void* dx, bool logarithm) {
  visit(num, [&]<class T>() { cpu::softmax_backward(ctx_, rows, cols, to<T>(y), to<T>(g), to<T>(dx), logarithm); });
}

std::int64_t CpuBackend::first_outside(const char*, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) {
  for (std::int64_t t = 0; t < count; ++t)
    if (ids[t] < low || ids[t] >= high) return t;
  return -1;
}
void CpuBackend::gather_rows(std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t, const std::int32_t* ids, void* out) {
  cpu::gather_rows(ctx_, count, row_bytes, table, ids, out);
}
void CpuBackend::scatter_add_rows(Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g,
                                  std::int64_t table_rows, Num table_num, void* table, bool overwrite) {
  const auto add = [&]<class T, class Out>() {
    cpu::scatter_add_rows(ctx_, count, cols, ids, to<T>(g), table_rows, to<Out>(table), overwrite);
  };
  if (num == Num::f64) add.template operator()<double, double>();
  else if (num == Num::f32 && table_num == Num::bf16) add.template operator()<float, bf16>();
  else if (num == Num::f32) add.template operator()<float, float>();
  else if (table_num == Num::bf16) add.template operator()<bf16, bf16>();
  else add.template operator()<bf16, float>();
}
void CpuBackend::store_pages(Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                             std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages) {
  const std::int64_t bytes = bytes_of(num), row = size * bytes;
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (rows[t] < 0) continue;
    const std::int64_t at = rows[t] / page, slot = rows[t] % page;
    for (std::int64_t h = 0; h < heads; ++h)
      std::memcpy(to<char>(pages) + ((at * heads + h) * page + slot) * row,
                  to<char>(from) + (t * row_stride + h * head_stride) * bytes, static_cast<std::size_t>(row));
  }
}

bool CpuBackend::takes_gelu_slope(const Gemm& g) { return strips_serve(g) && g.ldc == g.n; }
bool CpuBackend::takes_sums_of_a(const Gemm& g) { return strips_serve(g) && g.trans_a; }
void CpuBackend::gemm(const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual) {
  Gemm product = g;
  product.bias = bias != nullptr;
  if (g.gelu_slope_of != nullptr || g.sums_of_a != nullptr) {
    if ((g.gelu_slope_of != nullptr && (!takes_gelu_slope(g) || g.accumulate)) || (g.sums_of_a != nullptr && !takes_sums_of_a(g)) || bias != nullptr || residual != nullptr)
      throw std::invalid_argument("[gemm] GELU's slope and sums of A are taken where takes_gelu_slope() and takes_sums_of_a() say so, without bias or residual");
    return panel_gemm(ctx_, g, to<float>(a), to<float>(b), to<float>(c), nullptr);
  }
  if (g.before_gelu != nullptr) {
    if (g.batch != 1 || g.accumulate || residual != nullptr || g.ldc != g.n) throw std::invalid_argument("[gemm] GELU follows one product and its bias, in rows that lie close together");
    if (g.invariant && !g.trans_a && g.m > 0 && g.n > 0 && g.k > 0 && has_panel_gemm(product))  // as tiles are stored
      return panel_gemm(ctx_, product, to<float>(a), to<float>(b), to<float>(c), to<float>(bias));
    product.before_gelu = nullptr;
    gemm(product, a, b, g.before_gelu, bias, nullptr);
    return unary(UnaryOp::gelu, g.c, g.m * g.n, g.before_gelu, c);
  }
  if (residual != nullptr && g.invariant && g.m > 0 && g.n > 0 && g.k > 0 && has_panel_gemm(product))  // it adds as it stores
    return panel_gemm(ctx_, product, to<float>(a), to<float>(b), to<float>(c), to<float>(bias), to<float>(residual));
  if (residual != nullptr) {
    product.accumulate = true;
    Strided rows;
    rows.rank = 3;
    rows.shape[0] = g.batch, rows.shape[1] = g.m, rows.shape[2] = g.n;
    rows.to[0] = rows.from[0] = g.stride_c, rows.to[1] = rows.from[1] = g.ldc, rows.to[2] = rows.from[2] = 1;
    cpu::copy(ctx_, rows, g.c, c, g.c, residual);
  }
  if (bias == nullptr || g.c != Num::bf16) return cpu::gemm(ctx_, product, a, b, c, bias);
  std::vector<float> wide(static_cast<std::size_t>(g.n));  // the library takes f32 biases on every instruction set
  std::copy_n(to<bf16>(bias), g.n, wide.begin());
  cpu::gemm(ctx_, product, a, b, c, wide.data());
}

double CpuBackend::gemm_rate(Num num) {
  constexpr std::int64_t n = 768;
  const std::vector<double> ones(static_cast<std::size_t>(n * n), 0.5);
  const auto size = static_cast<std::size_t>(n * n * bytes_of(num));
  std::vector<char> a(size), b(size), c(size);
  Strided all;
  all.rank = 1, all.shape[0] = n * n, all.to[0] = all.from[0] = 1;
  for (void* matrix : {a.data(), b.data()}) cpu::copy(ctx_, all, num, matrix, Num::f64, ones.data());
  Gemm g;
  g.a = g.b = g.c = num;
  g.m = g.n = g.k = g.lda = g.ldb = g.ldc = n;
  double best = 0, spent = 0;
  for (int i = 0; i < 3 || (i < 12 && spent < 0.06); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    cpu::gemm(ctx_, g, a.data(), b.data(), c.data());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    spent += seconds;
    best = std::max(best, 2.0 * n * n * n / seconds);
  }
  return best;
}

void CpuBackend::quantize(const Quantize& q) { cpu::quantize(ctx_, q); }
void CpuBackend::gemm_fp8(const GemmFp8& g, const void* a, const void* b, void* c, const void* bias, const void* residual) {
  cpu::gemm_fp8(ctx_, g, a, b, c, bias, residual);
}

namespace {

template <class T>
AttentionArgs<T> typed(const Attention& s) {
  AttentionArgs<T> a;
  a.q = to<T>(s.q), a.k = to<T>(s.k), a.v = to<T>(s.v), a.out = to<T>(s.out);
  a.q_stride = s.q_stride, a.k_stride = s.k_stride, a.v_stride = s.v_stride, a.out_stride = s.out_stride;
  a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_size = s.head_size, a.window = s.window, a.scale = s.scale;
  a.starts = s.host_starts, a.sequences = s.sequences, a.rows = s.rows, a.lse = s.lse;
  a.key_begins = s.host_key_begins, a.key_counts = s.host_key_counts;
  a.dout = to<T>(s.dout), a.dout_stride = s.dout_stride;
  a.dq = to<T>(s.dq), a.dk = to<T>(s.dk), a.dv = to<T>(s.dv), a.dq_stride = s.dq_stride, a.dkv_stride = s.dkv_stride;
  return a;
}

/// Rows past the last sequence belong to nobody: they are zero.
void clear_dead_rows(Context& ctx, Num num, void* t, std::int64_t first, std::int64_t rows, std::int64_t cols, std::int64_t stride) {
  if (first >= rows) return;
  Strided s;
  s.rank = 2;
  s.shape[0] = rows - first, s.shape[1] = cols, s.to[0] = stride, s.to[1] = 1;
  fill(ctx, s, num, to<char>(t) + first * stride * bytes_of(num), 0);
}

}  // namespace

void CpuBackend::attention(const Attention& a) {
  visit(a.num, [&]<class T>() { cpu::attention_forward(ctx_, typed<T>(a)); });
  clear_dead_rows(ctx_, a.num, a.out, a.host_starts[a.sequences], a.rows, a.heads * a.head_size, a.out_stride);
}
void CpuBackend::attention_backward(const Attention& a) {
  visit(a.num, [&]<class T>() { cpu::attention_backward(ctx_, typed<T>(a)); });
  const std::int64_t used = a.host_starts[a.sequences];
  clear_dead_rows(ctx_, a.num, a.dq, used, a.rows, a.heads * a.head_size, a.dq_stride);
  if (a.host_key_begins != nullptr) return;  // their rows are the caller's
  for (void* t : {a.dk, a.dv}) clear_dead_rows(ctx_, a.num, t, used, a.rows, a.kv_heads * a.head_size, a.dkv_stride);
}
void CpuBackend::attention_paged(const PagedAttention& s) {
  if (s.page != attention_tile) throw std::invalid_argument("[attention_paged] the CPU reads pages of " + std::to_string(attention_tile) + " tokens");
  visit(s.num, [&]<class T>() {
    PagedAttentionArgs<T> a;
    a.q = to<T>(s.q), a.out = to<T>(s.out), a.q_stride = s.q_stride, a.out_stride = s.out_stride;
    a.k_pages = to<T>(s.k_pages), a.v_pages = to<T>(s.v_pages);
    a.blocks = s.blocks, a.lengths = s.lengths, a.starts = s.host_starts;
    a.blocks_stride = s.blocks_stride, a.sequences = s.sequences;
    a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_size = s.head_size, a.window = s.window, a.scale = s.scale;
    cpu::attention_paged(ctx_, a);
  });
  clear_dead_rows(ctx_, s.num, s.out, s.host_starts[s.sequences], s.rows, s.heads * s.head_size, s.out_stride);
}
void CpuBackend::score_rows(const ScoreRows& s) { cpu::score_rows(ctx_, s); }
void CpuBackend::score_rows_backward(const ScoreRows& s) { cpu::score_rows_backward(ctx_, s); }
void CpuBackend::weighted_sum(Num compute, std::int64_t n, const float* weights, const void* logprob, void* out) {
  cpu::weighted_sum(compute, n, weights, logprob, out);
}
bool CpuBackend::is_one(const char*, Num num, const void* x) {
  return visit(num, [&]<class T>() { return static_cast<double>(*to<T>(x)) == 1.0; });
}

void CpuBackend::adamw(const AdamWStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v) {
  visit_state(num, state_num, [&]<class T, class S>() { cpu::adamw(ctx_, s, n, to<T>(value), to<T>(grad), to<S>(m), to<S>(v)); });
}
void CpuBackend::sgd(const SgdStep& s, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer) {
  visit_state(num, state_num, [&]<class T, class S>() { cpu::sgd(ctx_, s, n, to<T>(value), to<T>(grad), to<S>(buffer)); });
}
void CpuBackend::momentum(const MomentumStep& s, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                          const void* grad, void* buffer, void* direction) {
  visit_state(num, state_num, [&]<class T, class S>() {
    cpu::momentum(ctx_, s, rows, cols, stride, to<T>(grad), to<S>(buffer), to<T>(direction));
  });
}
void CpuBackend::axpby(Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b,
                       const void* y, std::int64_t y_stride, void* out, std::int64_t out_stride) {
  if (num == Num::f64) cpu::axpby(ctx_, rows, cols, a, to<double>(x), x_stride, b, to<double>(y), y_stride, to<double>(out), out_stride);
  else cpu::axpby(ctx_, rows, cols, a, to<float>(x), x_stride, b, to<float>(y), y_stride, to<float>(out), out_stride);
}

}  // namespace capstan::kernels::cpu
