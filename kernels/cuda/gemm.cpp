// Matrix products over cuBLASLt. Its matrices are column-major: a row-major C = A B is C^T = B^T A^T there, so the
// operands change places and nothing is copied.
#include <kernels/cuda/gemm.h>

#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/reduce.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace capstan::kernels::cuda {

namespace {

/// How a product ends.
enum class Ending : std::uint8_t { plain, bias, gelu, gelu_bias, slope, sums };

/// Whether it reads or writes a vector beside C.
bool has_vector(Ending e) { return e == Ending::bias || e == Ending::gelu_bias || e == Ending::sums; }

struct Kind {
  const Gemm& g;
  Ending ending;
  std::uint32_t align_a, align_b, align_c, align_bias;

  GemmCache::Key key() const {
    const bool batch = g.batch > 1;
    return {0, static_cast<int>(g.a), static_cast<int>(g.b), static_cast<int>(g.c), g.trans_a, g.trans_b, static_cast<int>(ending), align_a, align_b,
            align_c, align_bias, g.m, g.n, g.k, g.lda, g.ldb, g.ldc, g.batch, batch ? g.stride_a : 0, batch ? g.stride_b : 0, batch ? g.stride_c : 0};
  }
  /// The same in words.
  std::string text() const {
    static constexpr const char* endings[] = {"", " bias", " gelu", " gelu bias", " gelu slope", " sums of a"};
    std::string kind = std::to_string(g.m) + "x" + std::to_string(g.n) + "x" + std::to_string(g.k) + (g.trans_a ? " t" : " n") + (g.trans_b ? "t" : "n");
    kind += " types" + words({static_cast<int>(g.a), static_cast<int>(g.b), static_cast<int>(g.c)}) + " rows" + words({g.lda, g.ldb, g.ldc});
    if (g.batch > 1) kind += " batch" + words({g.batch, g.stride_a, g.stride_b, g.stride_c});
    return kind + " on" + words({align_a, align_b, align_c, align_bias}) + endings[static_cast<int>(ending)];
  }
};

void describe(Product& p, const Gemm& g, Ending ending) {
  p.wide = g.c == Num::f64;
  check(cublasLtMatmulDescCreate(&p.operation, p.wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, p.wide ? CUDA_R_64F : CUDA_R_32F), "describing a product");
  p.set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<std::int32_t>(g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N));
  p.set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<std::int32_t>(g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N));
  constexpr cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                                              CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_BGRADB};
  const auto type = static_cast<std::int32_t>(product_type(g.c));
  p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<std::uint32_t>(epilogues[static_cast<int>(ending)]));
  if (has_vector(ending)) p.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
  if (ending == Ending::gelu || ending == Ending::gelu_bias || ending == Ending::slope) {
    p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, g.ldc);
    p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, type);
  }
  p.a = g.trans_b ? product_layout(g.b, g.k, g.n, g.ldb) : product_layout(g.b, g.n, g.k, g.ldb);
  p.b = g.trans_a ? product_layout(g.a, g.m, g.k, g.lda) : product_layout(g.a, g.k, g.m, g.lda);
  p.c = product_layout(g.c, g.n, g.m, g.ldc);
  if (g.batch == 1) return;
  const auto batch = [&](cublasLtMatrixLayout_t l, std::int64_t stride) {
    const auto count = static_cast<std::int32_t>(g.batch);
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride), "describing a batch");
  };
  batch(p.a, g.stride_b), batch(p.b, g.stride_a), batch(p.c, g.stride_c);
}

/// What a product reads and writes; bytes from the first element to the last.
Operands operands_of(const Gemm& g, const void* a, const void* b, void* c, const void* residual) {
  const auto bytes = [&](Num num, std::int64_t rows, std::int64_t cols, std::int64_t ld, std::int64_t stride) {
    return ((g.batch - 1) * stride + (rows - 1) * ld + cols) * bytes_of(num);
  };
  const std::int64_t a_bytes = g.trans_a ? bytes(g.a, g.k, g.m, g.lda, g.stride_a) : bytes(g.a, g.m, g.k, g.lda, g.stride_a);
  const std::int64_t b_bytes = g.trans_b ? bytes(g.b, g.n, g.k, g.ldb, g.stride_b) : bytes(g.b, g.k, g.n, g.ldb, g.stride_b);
  return {b, a, c, residual, g.accumulate || residual != nullptr, b_bytes, a_bytes, bytes(g.c, g.m, g.n, g.ldc, g.stride_c)};
}

/// Runs it with this ending; false, with nothing run, when the library has no algorithm for it. `vector`: the bias, read, or sums of A, written. `beside`: what GELU is taken of, written
/// or, for its slope, read.
bool multiply(Context& ctx, const Gemm& g, Ending ending, const Operands& o, const void* vector, const void* beside, cublasStatus_t* status) {
  const Kind kind{g, ending, alignment_of(o.b), alignment_of(o.a), std::min(alignment_of(o.d), alignment_of(o.c)), has_vector(ending) ? alignment_of(vector) : 0};
  auto& products = ctx.gemms().products;
  const auto [it, fresh] = products.try_emplace(kind.key());
  Product& p = it->second;
  const auto point = [&] {  // where the library looks at their alignment, and where it runs
    if (has_vector(ending)) p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
    if (beside != nullptr) p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, beside);
  };
  *status = CUBLAS_STATUS_NOT_SUPPORTED;
  if (fresh) {
    try {
      describe(p, g, ending);
      point();
      choose_algorithm(ctx, p, o, kind.text(), status);
    } catch (...) {
      products.erase(it);
      throw;
    }
  }
  if (!p.there) return false;
  point();
  run_product(ctx, p, o);
  return true;
}

/// Whether the library may take GELU, or its slope, of what lies `beside` C into the product. Not f32: nothing says how closely its epilogue's tanh is computed, and
/// bf16 alone rounds more coarsely than a tanh of 11 bits.
bool may_take_gelu(const Gemm& g, const void* c, const void* beside) {
  return takes_gelu_slope(g) && alignment_of(c) >= 16 && alignment_of(beside) >= 16;
}

/// With g.sums_of_a, which the epilogue overwrites: where they are to be added they go behind the scratch that products use first. False,
/// with nothing run, when the library has no algorithm for it.
bool multiply_and_sum(Context& ctx, const Gemm& g, const Operands& o, cublasStatus_t* status) {
  void* sums = g.sums_of_a;
  if (g.accumulate) sums = static_cast<char*>(ctx.scratch(product_scratch + g.m * bytes_of(g.c))) + product_scratch;
  if (!multiply(ctx, g, Ending::sums, o, sums, nullptr, status)) return false;
  if (g.accumulate) add(ctx, g.c, g.m, g.sums_of_a, sums, g.sums_of_a);
  return true;
}

}  // namespace

bool takes_sums_of_a(const Gemm& g) {
  return g.trans_a && !g.trans_b && g.a == Num::bf16 && g.b == Num::bf16 && g.c == Num::f32 && g.batch == 1 && g.n > 0;
}

bool takes_gelu_slope(const Gemm& g) { return g.c == Num::bf16 && g.a == Num::bf16 && g.b == Num::bf16 && g.batch == 1 && g.ldc == g.n && g.ldc % 8 == 0; }

void gemm(Context& ctx, const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual) {
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  if (g.k == 0) throw std::invalid_argument("[gemm] an inner dimension of 0");
  const bool gelu = g.before_gelu != nullptr;
  if (gelu && (g.batch != 1 || g.accumulate || residual != nullptr || g.ldc != g.n))
    throw std::invalid_argument("[gemm] GELU follows one product and its bias, in rows that lie close together");
  const bool slope = g.gelu_slope_of != nullptr;
  const bool sums = g.sums_of_a != nullptr;
  if ((sums && (!takes_sums_of_a(g) || gelu || slope || bias != nullptr || residual != nullptr)) || (slope && (!takes_gelu_slope(g) || g.accumulate || gelu || bias != nullptr || residual != nullptr)))
    throw std::invalid_argument("[gemm] sums of A and GELU's slope are taken where takes_sums_of_a() and takes_gelu_slope() say so, without bias or residual, the slope of a "
                                "product that nothing is added to");
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  if (sums && multiply_and_sum(ctx, g, operands_of(g, a, b, c, nullptr), &status)) return;
  if (sums) column_sum(ctx, g.a, a, g.k, g.m, g.lda, g.c, g.sums_of_a, g.accumulate);
  if (slope && may_take_gelu(g, c, g.gelu_slope_of) && multiply(ctx, g, Ending::slope, operands_of(g, a, b, c, nullptr), nullptr, g.gelu_slope_of, &status)) return;
  if (gelu && may_take_gelu(g, c, g.before_gelu) &&
      multiply(ctx, g, bias != nullptr ? Ending::gelu_bias : Ending::gelu, operands_of(g, a, b, c, nullptr), bias, g.before_gelu, &status))
    return;
  void* to = gelu ? g.before_gelu : c;
  const bool epilogue = bias != nullptr && g.c != Num::f64;
  if (bias != nullptr && !epilogue && (g.ldc != g.n || g.batch != 1)) throw std::invalid_argument("[gemm] a bias in f64 needs rows of C that lie close together");
  if (!multiply(ctx, g, epilogue ? Ending::bias : Ending::plain, operands_of(g, a, b, to, residual), bias, nullptr, &status))
    throw std::runtime_error("[gemm] cuBLASLt has no algorithm for " + std::to_string(g.m) + " x " + std::to_string(g.n) + " x " + std::to_string(g.k) +
                             ", element types " + std::to_string(static_cast<int>(g.a)) + ", " + std::to_string(static_cast<int>(g.b)) + " -> " +
                             std::to_string(static_cast<int>(g.c)) + " (status " + std::to_string(static_cast<int>(status)) + ")");
  if (bias != nullptr && !epilogue) add_bias(ctx, g.c, g.m, g.n, to, bias);
  if (gelu) unary(ctx, UnaryOp::gelu, g.c, g.m * g.n, g.before_gelu, c);
  if (slope) unary_backward(ctx, UnaryOp::gelu, g.c, g.m * g.n, g.gelu_slope_of, c, c);
}

}  // namespace capstan::kernels::cuda
