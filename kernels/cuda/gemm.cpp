// Matrix products over cuBLASLt. Its matrices are column-major: a row-major C = A B is C^T = B^T A^T there, so the
// operands change places and nothing is copied.
#include <kernels/cuda/gemm.h>

#include <kernels/cuda/elementwise.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

constexpr std::int64_t workspace_bytes = std::int64_t{64} << 20;

cudaDataType_t type_of(Num num) {
  switch (num) {
    case Num::f64: return CUDA_R_64F;
    case Num::f32: return CUDA_R_32F;
    case Num::bf16: return CUDA_R_16BF;
    case Num::f16: return CUDA_R_16F;
    case Num::f8e4m3: return CUDA_R_8F_E4M3;
    case Num::f8e5m2: return CUDA_R_8F_E5M2;
    default: throw std::invalid_argument("[gemm] element type number " + std::to_string(static_cast<int>(num)) + " has no products");
  }
}

/// The largest power of two up to 256 that divides the address.
std::uint32_t alignment_of(const void* p) {
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  return at == 0 ? 256 : static_cast<std::uint32_t>(std::min<std::uintptr_t>(256, at & (~at + 1)));
}

cublasLtMatrixLayout_t layout(Num num, std::int64_t rows, std::int64_t cols, std::int64_t ld, std::int64_t batch, std::int64_t stride) {
  cublasLtMatrixLayout_t l = nullptr;
  check(cublasLtMatrixLayoutCreate(&l, type_of(num), static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), ld), "describing a matrix");
  if (batch > 1) {
    const auto count = static_cast<std::int32_t>(batch);
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride), "describing a batch");
  }
  return l;
}

GemmCache::Entry make(Context& ctx, const Gemm& g, const void* a, const void* b, const void* c, const void* residual, bool bias) {
  GemmCache::Entry e;
  const bool wide = g.c == Num::f64;
  check(cublasLtMatmulDescCreate(&e.operation, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F), "describing a product");
  const cublasOperation_t first = g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  check(cublasLtMatmulDescSetAttribute(e.operation, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first), "describing a product");
  check(cublasLtMatmulDescSetAttribute(e.operation, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second), "describing a product");
  if (bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    check(cublasLtMatmulDescSetAttribute(e.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue), "describing a bias");
    const cudaDataType_t type = type_of(g.c);
    check(cublasLtMatmulDescSetAttribute(e.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type), "describing a bias");
  }
  e.a = g.trans_b ? layout(g.b, g.k, g.n, g.ldb, g.batch, g.stride_b) : layout(g.b, g.n, g.k, g.ldb, g.batch, g.stride_b);
  e.b = g.trans_a ? layout(g.a, g.m, g.k, g.lda, g.batch, g.stride_a) : layout(g.a, g.k, g.m, g.lda, g.batch, g.stride_a);
  e.c = layout(g.c, g.n, g.m, g.ldc, g.batch, g.stride_c);

  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "choosing a product's algorithm");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), "choosing a product's algorithm");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::size_t>(workspace_bytes));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(b));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(a));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, std::min(alignment_of(c), alignment_of(residual)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(c));
  cublasLtMatmulHeuristicResult_t found[1] = {};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(ctx.blas(), e.operation, e.a, e.b, e.c, e.c, preference, 1, found, &count);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0)
    throw std::runtime_error("[gemm] cuBLASLt has no algorithm for " + std::to_string(g.m) + " x " + std::to_string(g.n) + " x " + std::to_string(g.k) +
                             ", element types " + std::to_string(static_cast<int>(g.a)) + ", " + std::to_string(static_cast<int>(g.b)) + " -> " +
                             std::to_string(static_cast<int>(g.c)) + " (status " + std::to_string(static_cast<int>(status)) + ")");
  // The first of its list, always: a choice by measured time would change bits from run to run.
  e.algorithm = found[0].algo, e.workspace = found[0].workspaceSize;
  return e;
}

/// A row of ones times `bias`, for the types whose epilogue has none.
void add_bias(Context& ctx, const Gemm& g, void* c, const void* bias) {
  if (g.ldc != g.n || g.batch != 1) throw std::invalid_argument("[gemm] a bias in f64 needs rows of C that lie close together");
  Broadcast s;
  s.rank = 2;
  s.shape[0] = g.m, s.shape[1] = g.n, s.a[0] = g.n, s.a[1] = 1, s.b[0] = 0, s.b[1] = 1;
  binary(ctx, BinaryOp::add, s, g.c, c, bias, c);
}

}  // namespace

GemmCache::~GemmCache() {
  for (auto& [key, e] : entries) {
    cublasLtMatrixLayoutDestroy(e.a);
    cublasLtMatrixLayoutDestroy(e.b);
    cublasLtMatrixLayoutDestroy(e.c);
    cublasLtMatmulDescDestroy(e.operation);
  }
}

void gemm(Context& ctx, const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual) {
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  if (g.k == 0) throw std::invalid_argument("[gemm] an inner dimension of 0");
  const bool epilogue = bias != nullptr && g.c != Num::f64;
  const int flags = (g.trans_a ? 1 : 0) | (g.trans_b ? 2 : 0) | (epilogue ? 4 : 0) | static_cast<int>(alignment_of(a)) << 3 |
                    static_cast<int>(alignment_of(b)) << 12 | static_cast<int>(std::min(alignment_of(c), alignment_of(residual))) << 21;
  const GemmCache::Key key{static_cast<int>(g.a), static_cast<int>(g.b), static_cast<int>(g.c), flags, g.m, g.n, g.k, g.lda, g.ldb, g.ldc,
                           g.batch, g.stride_a, g.stride_b, g.stride_c};
  auto it = ctx.gemms().entries.find(key);
  if (it == ctx.gemms().entries.end()) it = ctx.gemms().entries.emplace(key, make(ctx, g, a, b, c, residual, epilogue)).first;
  const GemmCache::Entry& e = it->second;
  if (epilogue) check(cublasLtMatmulDescSetAttribute(e.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias), "giving a bias");
  const bool add = g.accumulate || residual != nullptr;
  const float alpha = 1, beta = add ? 1 : 0;
  const double wide_alpha = 1, wide_beta = add ? 1 : 0;
  const bool wide = g.c == Num::f64;
  check(cublasLtMatmul(ctx.blas(), e.operation, wide ? static_cast<const void*>(&wide_alpha) : &alpha, b, e.a, a, e.b,
                       wide ? static_cast<const void*>(&wide_beta) : &beta, residual != nullptr ? residual : c, e.c, c, e.c, &e.algorithm,
                       e.workspace > 0 ? ctx.scratch(workspace_bytes) : nullptr, e.workspace, ctx.stream()),
        "running a product");
  if (bias != nullptr && !epilogue) add_bias(ctx, g, c, bias);
}

double gemm_rate(Context& ctx, Num num) {
  const std::int64_t n = num == Num::bf16 ? 8192 : 4096, bytes = n * n * bytes_of(num);
  void* m[3] = {};
  for (void*& p : m)
    if ((p = ctx.allocate(bytes)) == nullptr) throw std::runtime_error("[cuda memory] no room for a product of " + std::to_string(n) + " squared");
  struct Free {
    Context& ctx;
    void** m;
    ~Free() { for (int i = 0; i < 3; ++i) if (m[i] != nullptr) ctx.release(m[i]); }
  } free_all{ctx, m};
  for (int i = 0; i < 2; ++i) {  // random values: zeros would run faster than real ones
    RandomFill fill;
    fill.key = static_cast<std::uint64_t>(i + 1), fill.normal = false, fill.scale = 1;
    random(ctx, num, fill, n * n, m[i]);
  }
  Gemm g;
  g.a = g.b = g.c = num;
  g.m = g.n = g.k = g.lda = g.ldb = g.ldc = n;
  g.trans_b = true;
  struct Events {
    cudaEvent_t begin = nullptr, end = nullptr;
    Events() { check(cudaEventCreate(&begin), "making an event"), check(cudaEventCreate(&end), "making an event"); }
    ~Events() { cudaEventDestroy(begin), cudaEventDestroy(end); }
  } events;
  double best = 0;
  for (int i = 0; i < 3; ++i) gemm(ctx, g, m[0], m[1], m[2], nullptr, nullptr);
  for (int i = 0; i < 10; ++i) {
    check(cudaEventRecord(events.begin, ctx.stream()), "timing");
    gemm(ctx, g, m[0], m[1], m[2], nullptr, nullptr);
    check(cudaEventRecord(events.end, ctx.stream()), "timing");
    check(cudaEventSynchronize(events.end), "timing");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events.begin, events.end), "timing");
    best = std::max(best, 2e3 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n) / static_cast<double>(ms));
  }
  return best;
}

}  // namespace capstan::kernels::cuda
