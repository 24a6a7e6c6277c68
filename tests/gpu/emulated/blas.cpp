// cuBLASLt's meaning, plainly: column-major D = op(A) op(B) + beta C (+ bias along the rows), batched, and GELU of that with what
// it was taken of, or that times GELU's slope, or beside it the sums of B along the products' sums. Shapes that the library would refuse are refused, and attributes of another size than cublasLt.h gives them; of
// fp8 products everything that Hopper (scalars) and Blackwell (scales of 32) refuse. An algorithm holds its caller to the
// alignment that it was asked for with, and to the scratch memory that it named.
#include <cublasLt.h>

#include <capstan/kernels/bf16.h>
#include <kernels/shared/fp8.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "gpu/emulated/graphs.h"

namespace {

using capstan::kernels::bf16;

constexpr int algorithms = 3;  // in the order in which the library proposes them
/// Scratch memory that each takes; it writes all over it.
constexpr std::size_t scratch_of(std::uint64_t algorithm) { return algorithm << 16; }

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
  void* aux = nullptr;
  std::int64_t aux_ld = 0;
  cudaDataType_t aux_type = static_cast<cudaDataType_t>(-1);
  bool gelu() const { return epilogue == CUBLASLT_EPILOGUE_GELU_AUX || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS; }
  bool slope() const { return epilogue == CUBLASLT_EPILOGUE_DGELU; }
  bool sums() const { return epilogue == CUBLASLT_EPILOGUE_BGRADB; }
  bool biased() const { return epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS; }
};
struct Preference { std::uint64_t workspace = 0; std::uint32_t a = 256, b = 256, c = 256, d = 256; };
struct Layout {
  cudaDataType_t type;
  std::int64_t rows, cols, ld;
  std::int32_t batch = 1;
  std::int64_t stride = 0;
};

Operation& of(cublasLtMatmulDesc_t d) { return *reinterpret_cast<Operation*>(d); }
Layout& of(cublasLtMatrixLayout_t l) { return *reinterpret_cast<Layout*>(l); }
Preference& of(cublasLtMatmulPreference_t p) { return *reinterpret_cast<Preference*>(p); }

/// False when the caller's value has another size.
template <class T>
bool take(T& to, const void* value, std::size_t size) {
  if (value == nullptr || size != sizeof to) return false;
  std::memcpy(&to, value, sizeof to);
  return true;
}
cublasStatus_t status_of(bool good) { return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE; }
bool lies_on(const void* p, std::uint64_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }
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
  if (op.biased() && op.bias == nullptr) return false;
  if (op.epilogue != CUBLASLT_EPILOGUE_DEFAULT && !op.biased() && !op.gelu() && !op.slope() && !op.sums()) return false;
  if (op.sums() && (op.bias == nullptr || op.bias_type != d.type || d.batch != 1 || is_fp8(a) || d.type == CUDA_R_64F || k % 8 != 0)) return false;
  if ((op.gelu() || op.slope()) && k % 8 != 0) return false;  // so that there are products without such an algorithm
  if ((op.gelu() || op.slope()) && (op.aux == nullptr || op.aux_ld % 8 != 0 || op.aux_ld < m || op.aux_type != d.type || d.batch != 1 || is_fp8(a) || d.type == CUDA_R_64F))
    return false;
  if (is_fp8(a) || is_fp8(b)) {
    const bool blocks = op.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
    if (!is_fp8(a) || !is_fp8(b) || (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2)) return false;
    if (op.a != CUBLAS_OP_T || op.b != CUBLAS_OP_N || op.compute != CUBLAS_COMPUTE_32F || op.fast != 0) return false;
    if (op.a_mode != op.b_mode || op.a_scale == nullptr || op.b_scale == nullptr) return false;
    if (k % (blocks ? 32 : 16) != 0 || m % 16 != 0 || a.ld % 16 != 0 || b.ld % 16 != 0 || d.ld % 8 != 0) return false;
    if (d.type != CUDA_R_16BF && d.type != CUDA_R_32F) return false;
    if (op.biased() && op.bias_type != CUDA_R_16BF) return false;
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
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what, const void* value, size_t size) {
  Operation& o = of(d);
  const auto read = [&](auto& to) { return status_of(take(to, value, size)); };
  switch (what) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return read(o.a);
    case CUBLASLT_MATMUL_DESC_TRANSB: return read(o.b);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return read(o.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return read(o.bias);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return read(o.bias_type);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return read(o.aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return read(o.aux_ld);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return read(o.aux_type);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: return read(o.a_mode);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: return read(o.b_mode);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: return read(o.a_scale);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: return read(o.b_scale);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM: return read(o.fast);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
  return *l = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols), ld}), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return delete &of(l), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t what, const void* value, size_t size) {
  if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) return status_of(take(of(l).batch, value, size));
  if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return status_of(take(of(l).stride, value, size));
  return CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  return *p = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return delete &of(p), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t what, const void* value, size_t size) {
  const auto read = [&](auto& to) { return status_of(take(to, value, size)); };
  switch (what) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return read(of(p).workspace);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return read(of(p).a);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return read(of(p).b);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return read(of(p).c);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return read(of(p).d);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t e, cublasLtMatmulPreference_t preference, int asked,
                                              cublasLtMatmulHeuristicResult_t results[], int* count) {
  *count = 0;
  if (asked < 1 || !fits(of(d), layout_of(a), layout_of(b), layout_of(c), layout_of(e))) return CUBLAS_STATUS_NOT_SUPPORTED;
  const Preference& wanted = of(preference);
  const auto aligned = static_cast<std::uint64_t>(wanted.a) << 48 | static_cast<std::uint64_t>(wanted.b) << 32 | wanted.c << 16 | wanted.d;
  for (std::uint64_t i = 0; i < algorithms && *count < asked; ++i) {
    if (scratch_of(i) > wanted.workspace) continue;
    cublasLtMatmulHeuristicResult_t& result = results[(*count)++];
    result = {};
    result.algo.data[0] = i, result.algo.data[1] = aligned, result.workspaceSize = scratch_of(i);
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result) {
  *result = {};
  result->workspaceSize = scratch_of(algorithm->data[0]);
  return algorithm->data[0] < algorithms ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
size_t cublasLtGetVersion() { return 130100; }
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* out,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* scratch, size_t scratch_bytes, cudaStream_t) {
  const Operation op = of(d);
  const Layout A = layout_of(a_layout), B = layout_of(b_layout), C = layout_of(c_layout), D = layout_of(d_layout);
  const std::uint64_t number = algorithm->data[0];  // tells in which order a sum is added
  if (number >= algorithms) return CUBLAS_STATUS_NOT_SUPPORTED;
  capstan::emulated::product_ran(static_cast<int>(number));
  if (!fits(op, A, B, C, D)) return CUBLAS_STATUS_INVALID_VALUE;
  const std::uint64_t aligned = algorithm->data[1];
  if (!lies_on(a, aligned >> 48) || !lies_on(b, aligned >> 32 & 0xffff) || !lies_on(c, aligned >> 16 & 0xffff) || !lies_on(out, aligned & 0xffff))
    return CUBLAS_STATUS_INVALID_VALUE;
  const std::size_t room = scratch_of(number);
  if (room > 0 && (scratch == nullptr || scratch_bytes < room || !lies_on(scratch, 256))) return CUBLAS_STATUS_INVALID_VALUE;
  const double one = read(alpha, op.scale, 0), add = read(beta, op.scale, 0);
  const bool wide = op.compute == CUBLAS_COMPUTE_64F;
  const std::int64_t k = op.a == CUBLAS_OP_N ? A.cols : A.rows;
  // The measurement of the machine's rate at the start of a run: seconds of work here, and nobody reads the result. It takes
  // a millisecond more, so that the smallest of them is large enough.
  if (static_cast<double>(D.rows) * static_cast<double>(D.cols) * static_cast<double>(k) >= 512.0 * 512 * 512) {
    capstan::emulated::product_ran(0);
    return CUBLAS_STATUS_SUCCESS;
  }
  capstan::emulated::touch_device_memory([=] {
    if (room > 0) std::memset(scratch, 0xff, room);
    for (std::int64_t j = 0; op.sums() && j < D.cols; ++j) {
      float sum = 0;
      for (std::int64_t p = 0; p < k; ++p) sum += static_cast<float>(read(b, B.type, op.b == CUBLAS_OP_N ? j * B.ld + p : p * B.ld + j));
      write(const_cast<void*>(op.bias), op.bias_type, j, static_cast<double>(sum));
    }
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
          if (op.biased()) value += read(op.bias, op.bias_type, i);
          if (op.gelu()) {
            write(op.aux, op.aux_type, j * op.aux_ld + i, value);
            value = 0.5 * value * (1 + std::tanh(0.7978845608028654 * (value + 0.044715 * value * value * value)));
          }
          if (op.slope()) {
            const double x = read(op.aux, op.aux_type, j * op.aux_ld + i), t = std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
            value *= 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
          }
          write(out, D.type, batch * D.stride + j * D.ld + i, value);
        }
  });
  return CUBLAS_STATUS_SUCCESS;
}
}
