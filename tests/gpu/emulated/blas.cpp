// cuBLASLt's meaning, plainly: column-major D = op(A) op(B) + beta C (+ bias along the rows), batched. Shapes that the library
// would refuse are refused; of fp8 products everything that Hopper (scalars) and Blackwell (scales of 32) refuse.
#include <cublasLt.h>

#include <capstan/kernels/bf16.h>
#include <kernels/shared/fp8.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "gpu/emulated/graphs.h"

namespace {

using capstan::kernels::bf16;

constexpr int algorithms = 3;  // in the order in which the library proposes them

struct Operation {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  cublasOperation_t a = CUBLAS_OP_N, b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  cudaDataType_t bias_type = CUDA_R_32F;
  std::int32_t a_mode = 0, b_mode = 0;
  const void *a_scale = nullptr, *b_scale = nullptr;
  std::int8_t fast = -1;  // as it was set
};
struct Layout {
  cudaDataType_t type;
  std::int64_t rows, cols, ld;
  std::int32_t batch = 1;
  std::int64_t stride = 0;
};

Operation& of(cublasLtMatmulDesc_t d) { return *reinterpret_cast<Operation*>(d); }
Layout& of(cublasLtMatrixLayout_t l) { return *reinterpret_cast<Layout*>(l); }
const Layout& layout_of(cublasLtMatrixLayout_t l) { return *reinterpret_cast<const Layout*>(l); }

double read(const void* p, cudaDataType_t type, std::int64_t i) {
  switch (type) {
    case CUDA_R_64F: return static_cast<const double*>(p)[i];
    case CUDA_R_32F: return static_cast<double>(static_cast<const float*>(p)[i]);
    case CUDA_R_8F_E4M3: return static_cast<double>(capstan::kernels::from_fp8<capstan::kernels::E4M3>(static_cast<const std::uint8_t*>(p)[i]));
    case CUDA_R_8F_E5M2: return static_cast<double>(capstan::kernels::from_fp8<capstan::kernels::E5M2>(static_cast<const std::uint8_t*>(p)[i]));
    default: return static_cast<double>(static_cast<float>(static_cast<const bf16*>(p)[i]));
  }
}
void write(void* p, cudaDataType_t type, std::int64_t i, double v) {
  switch (type) {
    case CUDA_R_64F: static_cast<double*>(p)[i] = v; break;
    case CUDA_R_32F: static_cast<float*>(p)[i] = static_cast<float>(v); break;
    default: static_cast<bf16*>(p)[i] = bf16(static_cast<float>(v));
  }
}

bool is_fp8(const Layout& l) { return l.type == CUDA_R_8F_E4M3 || l.type == CUDA_R_8F_E5M2; }

/// The scale of number p along the sum, in row (or column) `line` of an operand with k numbers a line.
double scale_of(std::int32_t mode, const void* scale, std::int64_t line, std::int64_t p, std::int64_t k) {
  if (mode != CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0) return static_cast<double>(static_cast<const float*>(scale)[0]);
  return static_cast<double>(capstan::kernels::e8m0_value(static_cast<const std::uint8_t*>(scale)[capstan::kernels::block_scale_at(line, p / 32, k / 32)]));
}

bool fits(const Operation& op, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const std::int64_t m = op.a == CUBLAS_OP_N ? a.rows : a.cols, k = op.a == CUBLAS_OP_N ? a.cols : a.rows;
  const std::int64_t k2 = op.b == CUBLAS_OP_N ? b.rows : b.cols, n = op.b == CUBLAS_OP_N ? b.cols : b.rows;
  for (const Layout* l : {&a, &b, &c, &d})
    if (l->ld < l->rows || l->batch != d.batch) return false;
  if (is_fp8(a) || is_fp8(b)) {
    const bool blocks = op.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
    if (!is_fp8(a) || !is_fp8(b) || (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2)) return false;
    if (op.a != CUBLAS_OP_T || op.b != CUBLAS_OP_N || op.compute != CUBLAS_COMPUTE_32F || op.fast != 0) return false;
    if (op.a_mode != op.b_mode || op.a_scale == nullptr || op.b_scale == nullptr) return false;
    if (k % (blocks ? 32 : 16) != 0 || m % 16 != 0 || a.ld % 16 != 0 || b.ld % 16 != 0 || d.ld % 8 != 0) return false;
    if (d.type != CUDA_R_16BF && d.type != CUDA_R_32F) return false;
    if (op.epilogue == CUBLASLT_EPILOGUE_BIAS && op.bias_type != CUDA_R_16BF) return false;
  }
  return k == k2 && c.rows == m && c.cols == n && d.rows == m && d.cols == n;
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) { return *h = reinterpret_cast<cublasLtHandle_t>(new int(0)), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return delete reinterpret_cast<int*>(h), CUBLAS_STATUS_SUCCESS; }
const char* cublasLtGetStatusName(cublasStatus_t) { return "emulated"; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t scale) {
  return *d = reinterpret_cast<cublasLtMatmulDesc_t>(new Operation{compute, scale}), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return delete &of(d), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what, const void* value, size_t) {
  Operation& o = of(d);
  switch (what) {
    case CUBLASLT_MATMUL_DESC_TRANSA: std::memcpy(&o.a, value, sizeof o.a); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: std::memcpy(&o.b, value, sizeof o.b); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: std::memcpy(&o.epilogue, value, sizeof o.epilogue); break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: std::memcpy(&o.bias, value, sizeof o.bias); break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: std::memcpy(&o.bias_type, value, sizeof o.bias_type); break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: std::memcpy(&o.a_mode, value, sizeof o.a_mode); break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: std::memcpy(&o.b_mode, value, sizeof o.b_mode); break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: std::memcpy(&o.a_scale, value, sizeof o.a_scale); break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: std::memcpy(&o.b_scale, value, sizeof o.b_scale); break;
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM: std::memcpy(&o.fast, value, sizeof o.fast); break;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
  return *l = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols), ld}), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return delete &of(l), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t what, const void* value, size_t) {
  if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) std::memcpy(&of(l).batch, value, sizeof(std::int32_t));
  else if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) std::memcpy(&of(l).stride, value, sizeof(std::int64_t));
  else return CUBLAS_STATUS_NOT_SUPPORTED;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) { return *p = nullptr, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t e, cublasLtMatmulPreference_t, int asked,
                                              cublasLtMatmulHeuristicResult_t results[], int* count) {
  *count = 0;
  if (asked < 1 || !fits(of(d), layout_of(a), layout_of(b), layout_of(c), layout_of(e))) return CUBLAS_STATUS_NOT_SUPPORTED;
  *count = asked < algorithms ? asked : algorithms;
  for (int i = 0; i < *count; ++i) results[i] = {}, results[i].algo.data[0] = static_cast<std::uint64_t>(i);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result) {
  *result = {};
  return algorithm->data[0] < algorithms ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
size_t cublasLtGetVersion() { return 130100; }
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* out,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void*, size_t, cudaStream_t) {
  const Operation op = of(d);
  const Layout A = layout_of(a_layout), B = layout_of(b_layout), C = layout_of(c_layout), D = layout_of(d_layout);
  const std::uint64_t number = algorithm->data[0];  // tells in which order a sum is added
  if (number >= algorithms) return CUBLAS_STATUS_NOT_SUPPORTED;
  capstan::emulated::product_ran(static_cast<int>(number));
  if (!fits(op, A, B, C, D)) return CUBLAS_STATUS_INVALID_VALUE;
  const double one = read(alpha, op.scale, 0), add = read(beta, op.scale, 0);
  const bool wide = op.compute == CUBLAS_COMPUTE_64F;
  const std::int64_t k = op.a == CUBLAS_OP_N ? A.cols : A.rows;
  // The measurement of the machine's rate at the start of a run: a minute of work here, and nobody reads the result.
  if (static_cast<double>(D.rows) * static_cast<double>(D.cols) * static_cast<double>(k) > 1e10) return CUBLAS_STATUS_SUCCESS;
  capstan::emulated::touch_device_memory([=] {
    for (std::int64_t batch = 0; batch < D.batch; ++batch)
      for (std::int64_t j = 0; j < D.cols; ++j)
        for (std::int64_t i = 0; i < D.rows; ++i) {
          double sum = 0;
          float narrow = 0;
          for (std::int64_t q = 0; q < k; ++q) {
            const std::int64_t p = number == 0 ? q : number == 1 ? k - 1 - q : q % 2 == 0 ? q / 2 : k - 1 - q / 2;
            double x = read(a, A.type, batch * A.stride + (op.a == CUBLAS_OP_N ? p * A.ld + i : i * A.ld + p));
            double y = read(b, B.type, batch * B.stride + (op.b == CUBLAS_OP_N ? j * B.ld + p : p * B.ld + j));
            if (is_fp8(A)) x *= scale_of(op.a_mode, op.a_scale, i, p, k), y *= scale_of(op.b_mode, op.b_scale, j, p, k);
            if (wide) sum += x * y;
            else narrow += static_cast<float>(x) * static_cast<float>(y);
          }
          double value = one * (wide ? sum : static_cast<double>(narrow));
          if (add != 0) value += add * read(c, C.type, batch * C.stride + j * C.ld + i);
          if (op.epilogue == CUBLASLT_EPILOGUE_BIAS) value += read(op.bias, op.bias_type, i);
          write(out, D.type, batch * D.stride + j * D.ld + i, value);
        }
  });
  return CUBLAS_STATUS_SUCCESS;
}
}
