// Products of fp8 matrices over cuBLASLt. Its matrices are column-major: C = A B^T by rows is C^T = B A^T there, so B comes
// first, transposed, and both operands are read along what the product sums over: the one form that Hopper's fp8 products
// take.
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/fp8.h>

#include <kernels/shared/fp8.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <tuple>

namespace capstan::kernels::cuda {

namespace {

constexpr std::int64_t workspace_bytes = std::int64_t{64} << 20;

cudaDataType_t type_of(Num num) {
  switch (num) {
    case Num::f32:
      return CUDA_R_32F;
    case Num::bf16:
      return CUDA_R_16BF;
    case Num::f8e4m3:
      return CUDA_R_8F_E4M3;
    case Num::f8e5m2:
      return CUDA_R_8F_E5M2;
    default:
      throw std::invalid_argument("[gemm_fp8] element type number " + std::to_string(static_cast<int>(num)) +
                                  " has no fp8 products");
  }
}

std::string shape_of(const GemmFp8& g) {
  return std::to_string(g.m) + " x " + std::to_string(g.n) + " x " + std::to_string(g.k);
}

/// Descriptors of one kind of product, and the algorithm: the library's first choice, the same on every run.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  std::size_t workspace = 0;
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (a != nullptr) cublasLtMatrixLayoutDestroy(a);
    if (b != nullptr) cublasLtMatrixLayoutDestroy(b);
    if (c != nullptr) cublasLtMatrixLayoutDestroy(c);
    if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
  }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, T value) {
    check(cublasLtMatmulDescSetAttribute(operation, what, &value, sizeof value), "describing an fp8 product");
  }
};

struct Plans {
  using Key = std::tuple<int, int, int, int, bool, bool, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  std::map<Key, Plan> all;
};

void describe(Context& ctx, Plan& p, const GemmFp8& g, bool bias) {
  check(cublasLtMatmulDescCreate(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing an fp8 product");
  p.set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  p.set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  // Hopper's own sums keep 14 bits; without fast accumulation the library moves them into f32 as it goes.
  p.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, std::int8_t{0});
  const std::int32_t mode =
      g.scaling == Scaling::block ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 : CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
  p.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
  p.set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
  p.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, g.b_scale);  // the heuristic looks at whether they are there
  p.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, g.a_scale);
  if (bias) {
    p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    p.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<std::int32_t>(type_of(g.c)));
  }
  const auto layout = [](Num num, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    cublasLtMatrixLayout_t l = nullptr;
    check(
        cublasLtMatrixLayoutCreate(&l, type_of(num), static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), ld),
        "describing a matrix");
    return l;
  };
  p.a = layout(g.b, g.k, g.n, g.k), p.b = layout(g.a, g.k, g.m, g.k), p.c = layout(g.c, g.n, g.m, g.ldc);
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "choosing a product's algorithm");
  const std::size_t room = workspace_bytes;
  cublasLtMatmulHeuristicResult_t found[1] = {};
  int count = 0;
  cublasStatus_t status =
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(ctx.blas(), p.operation, p.a, p.b, p.c, p.c, preference, 1, found, &count);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0)
    throw std::runtime_error("[gemm_fp8] cuBLASLt has no algorithm for " + shape_of(g) + ", element types " +
                             std::to_string(static_cast<int>(g.a)) + ", " + std::to_string(static_cast<int>(g.b)) + " -> " +
                             std::to_string(static_cast<int>(g.c)) + " (status " + std::to_string(static_cast<int>(status)) +
                             "); precision.linear=compute runs without fp8");
  p.algorithm = found[0].algo, p.workspace = found[0].workspaceSize;
}

/// Columns [n] added to rows of C that lie close together.
void add_bias(Context& ctx, const GemmFp8& g, void* c, const void* bias) {
  if (g.ldc != g.n) throw std::invalid_argument("[gemm_fp8] a bias in f32 needs rows of C that lie close together");
  Broadcast s;
  s.rank = 2;
  s.shape[0] = g.m, s.shape[1] = g.n, s.a[0] = g.n, s.a[1] = 1, s.b[0] = 0, s.b[1] = 1;
  binary(ctx, BinaryOp::add, s, g.c, c, bias, c);
}

}  // namespace

std::string fp8_problem(Context& ctx, Scaling scaling) {
  const int have = ctx.capability();  // at least 9.0, which has fp8 products with one scale a matrix
  if (scaling == Scaling::tensor || have >= 100) return "";
  return "this GPU has compute capability " + std::to_string(have / 10) + "." + std::to_string(have % 10) +
         ", block scales (mxfp8) need 10.0: expected precision.linear=fp8, or run.device=cpu, which computes the same "
         "numbers slowly";
}

void gemm_fp8(Context& ctx, const GemmFp8& g, const void* a, const void* b, void* c, const void* bias,
              const void* residual) {
  if (g.m == 0 || g.n == 0) return;
  const std::int64_t unit = fp8_multiple(g.scaling);
  if (g.k == 0 || g.k % unit != 0 || g.n % 16 != 0)
    throw std::invalid_argument("[gemm_fp8] " + shape_of(g) + ": expected an inner dimension that is a multiple of " +
                                std::to_string(unit) + " and columns that are one of 16");
  for (const void* p : {a, b, static_cast<const void*>(c), residual})
    if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0)
      throw std::invalid_argument("[gemm_fp8] operands must lie on 16 bytes");
  const bool epilogue = bias != nullptr && g.c == Num::bf16;  // with f32 results the library's bias would be bf16
  if (!ctx.fp8_plans) ctx.fp8_plans = std::make_shared<Plans>();
  auto& plans = *static_cast<Plans*>(ctx.fp8_plans.get());
  const Plans::Key key{static_cast<int>(g.a),
                       static_cast<int>(g.b),
                       static_cast<int>(g.c),
                       static_cast<int>(g.scaling),
                       epilogue,
                       g.accumulate || residual != nullptr,
                       g.m,
                       g.n,
                       g.k,
                       g.ldc};
  auto [it, fresh] = plans.all.try_emplace(key);
  Plan& p = it->second;
  if (fresh) {
    try {
      describe(ctx, p, g, epilogue);
    } catch (...) {
      plans.all.erase(it);
      throw;
    }
  }
  p.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, g.b_scale);
  p.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, g.a_scale);
  if (epilogue) p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const float alpha = 1, beta = g.accumulate || residual != nullptr ? 1 : 0;
  check(
      cublasLtMatmul(ctx.blas(), p.operation, &alpha, b, p.a, a, p.b, &beta, residual != nullptr ? residual : c, p.c, c, p.c,
                     &p.algorithm, p.workspace > 0 ? ctx.scratch(workspace_bytes) : nullptr, p.workspace, ctx.stream()),
      "running an fp8 product");
  if (bias != nullptr && !epilogue) add_bias(ctx, g, c, bias);
}

double gemm_rate_fp8(Context& ctx) {
  const std::int64_t n = 8192;
  void* m[5] = {};
  struct Free {
    Context& ctx;
    void** m;
    ~Free() {
      for (int i = 0; i < 5; ++i)
        if (m[i] != nullptr) ctx.release(m[i]);
    }
  } free_all{ctx, m};
  const std::int64_t bytes[5] = {n * n, n * n, 256, 256, n * n * 2};
  for (int i = 0; i < 5; ++i)
    if ((m[i] = ctx.allocate(bytes[i])) == nullptr)
      throw std::runtime_error("[cuda memory] no room for a product of " + std::to_string(n) + " squared");
  for (int i = 0; i < 2; ++i) {  // random values: zeros would run faster than real ones
    RandomFill fill;
    fill.key = static_cast<std::uint64_t>(i + 1), fill.normal = false, fill.scale = 1;
    random(ctx, Num::bf16, fill, n * n, m[4]);
    Quantize q;
    q.rows = q.cols = q.stride = n, q.x = m[4], q.data = m[i], q.scale = m[2 + i];
    quantize(ctx, q);
  }
  GemmFp8 g;
  g.m = g.n = g.k = g.ldc = n, g.a_scale = m[2], g.b_scale = m[3];
  struct Events {
    cudaEvent_t begin = nullptr, end = nullptr;
    Events() { check(cudaEventCreate(&begin), "making an event"), check(cudaEventCreate(&end), "making an event"); }
    ~Events() { cudaEventDestroy(begin), cudaEventDestroy(end); }
  } events;
  double best = 0;
  for (int i = 0; i < 13; ++i) {
    check(cudaEventRecord(events.begin, ctx.stream()), "timing");
    gemm_fp8(ctx, g, m[0], m[1], m[4], nullptr, nullptr);
    check(cudaEventRecord(events.end, ctx.stream()), "timing");
    check(cudaEventSynchronize(events.end), "timing");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events.begin, events.end), "timing");
    const auto side = static_cast<double>(n);
    if (i >= 3) best = std::max(best, 2e3 * side * side * side / static_cast<double>(ms));
  }
  return best;
}

}  // namespace capstan::kernels::cuda
