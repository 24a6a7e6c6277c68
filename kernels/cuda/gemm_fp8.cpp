// Products of fp8 matrices over cuBLASLt. Its matrices are column-major: C = A B^T by rows is C^T = B A^T there, so B comes
// first, transposed, and both operands are read along what the product sums over: the one form that Hopper's fp8 products
// take.
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/fp8.h>
#include <kernels/cuda/gemm.h>

#include <kernels/shared/fp8.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace capstan::kernels::cuda {

namespace {

std::string shape_of(const GemmFp8& g) {
  return std::to_string(g.m) + " x " + std::to_string(g.n) + " x " + std::to_string(g.k);
}

struct Kind {
  const GemmFp8& g;
  bool bias;
  std::uint32_t align_a, align_b, align_c, align_bias;

  GemmCache::Key key() const {
    return {1, static_cast<int>(g.a), static_cast<int>(g.b), static_cast<int>(g.c), static_cast<int>(g.scaling), bias,
            align_a, align_b, align_c, align_bias, g.m, g.n, g.k, g.ldc};
  }
  /// The same in words.
  std::string text() const {
    return shape_of(g) + (g.scaling == Scaling::block ? " mxfp8" : " fp8") + " types" +
           words({static_cast<int>(g.a), static_cast<int>(g.b), static_cast<int>(g.c)}) + " rows" + words({g.ldc}) + " on" +
           words({align_a, align_b, align_c, align_bias}) + (bias ? " bias" : "");
  }
};

void describe(Product& p, const GemmFp8& g, bool bias) {
  check(cublasLtMatmulDescCreate(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing an fp8 product");
  p.set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<std::int32_t>(CUBLAS_OP_T));
  p.set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<std::int32_t>(CUBLAS_OP_N));
  // Hopper's own sums keep 14 bits; without fast accumulation the library moves them into f32 as it goes.
  p.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, std::int8_t{0});
  const std::int32_t mode =
      g.scaling == Scaling::block ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 : CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
  p.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
  p.set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
  if (bias) {
    p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<std::uint32_t>(CUBLASLT_EPILOGUE_BIAS));
    p.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<std::int32_t>(product_type(g.c)));
  }
  p.a = product_layout(g.b, g.k, g.n, g.k), p.b = product_layout(g.a, g.k, g.m, g.k), p.c = product_layout(g.c, g.n, g.m, g.ldc);
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
  if (g.k == 0 || g.k % unit != 0 || g.n % 16 != 0 || g.ldc * bytes_of(g.c) % 16 != 0)
    throw std::invalid_argument("[gemm_fp8] " + shape_of(g) + ": expected an inner dimension that is a multiple of " +
                                std::to_string(unit) + ", columns that are one of 16, and rows of C that begin on 16 bytes");
  for (const void* p : {a, b, static_cast<const void*>(c), residual})
    if (alignment_of(p) < 16) throw std::invalid_argument("[gemm_fp8] operands must lie on 16 bytes");
  if (bias != nullptr && g.ldc != g.n) throw std::invalid_argument("[gemm_fp8] a bias needs rows of C that lie close together");
  const bool epilogue = bias != nullptr && g.c == Num::bf16;  // with f32 results the library's bias would be bf16
  const std::int64_t last = (g.m - 1) * g.ldc + g.n;
  const Operands o{b, a, c, residual, g.accumulate || residual != nullptr, g.n * g.k, g.m * g.k, last * bytes_of(g.c)};
  const Kind kind{g, epilogue, alignment_of(a), alignment_of(b), std::min(alignment_of(c), alignment_of(residual)),
                  epilogue ? alignment_of(bias) : 0};
  auto& products = ctx.gemms().products;
  const auto [it, fresh] = products.try_emplace(kind.key());
  Product& p = it->second;
  const auto point = [&] {  // the heuristic looks at whether they are there, and how they lie
    p.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, g.b_scale);
    p.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, g.a_scale);
    if (epilogue) p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  };
  if (fresh) {
    try {
      describe(p, g, epilogue);
      point();
      cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
      if (!choose_algorithm(ctx, p, o, kind.text(), &status))
        throw std::runtime_error("[gemm_fp8] cuBLASLt has no algorithm for " + kind.text() + " (status " +
                                 std::to_string(static_cast<int>(status)) + "); precision.linear=compute runs without fp8");
    } catch (...) {
      products.erase(it);
      throw;
    }
  }
  point();
  run_product(ctx, p, o);
  if (bias != nullptr && !epilogue) add_bias(ctx, g.c, g.m, g.n, c, bias);
}

}  // namespace capstan::kernels::cuda
