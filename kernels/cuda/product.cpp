// Algorithms of cuBLASLt's products: found, timed, kept, run.
#include <kernels/cuda/product.h>

#include <kernels/cuda/elementwise.h>

#include <algorithm>
#include <span>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

cublasStatus_t launch_product(Context& ctx, const Product& p, const Operands& o, void* workspace) {
  const float alpha = 1, beta = o.add ? 1 : 0;
  const double wide_alpha = 1, wide_beta = o.add ? 1 : 0;
  return cublasLtMatmul(ctx.blas(), p.operation, p.wide ? static_cast<const void*>(&wide_alpha) : &alpha, o.a, p.a, o.b, p.b,
                        p.wide ? static_cast<const void*>(&wide_beta) : &beta, o.c != nullptr ? o.c : o.d, p.c, o.d, p.c, &p.algorithm, workspace,
                        p.workspace, ctx.stream());
}

/// Copies of a product's operands, so many that those used last have left the cache when their turn comes again. They lie
/// as far from 256-byte boundaries as the operands do.
class Rotation {
 public:
  Rotation(Context& ctx, const Operands& o) : ctx_(ctx) {
    const std::int64_t bytes = o.a_bytes + o.b_bytes + o.d_bytes;
    int cache = 0;
    check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, ctx.device()), "reading the size of the cache");
    const std::int64_t wanted = std::clamp<std::int64_t>(2 * static_cast<std::int64_t>(cache) / bytes + 1, 1, 16);
    for (std::int64_t i = 0; i < wanted; ++i) {
      Operands mine = o;
      void* c = nullptr;
      mine.a = take(o.a, o.a_bytes), mine.b = take(o.b, o.b_bytes), mine.d = take(o.d, o.d_bytes);
      if (mine.a == nullptr || mine.b == nullptr || mine.d == nullptr) break;
      if (o.c != nullptr && (c = take(o.c, o.d_bytes)) == nullptr) break;
      mine.c = c;
      all_.push_back(mine);
    }
    if (all_.empty())
      throw std::runtime_error("[cuda memory] no room for " + std::to_string(bytes) + " bytes to time a product with; leave more room (see the keys "
                               "that lower the need: data.micro_batch, train.recompute), or set run.gemm_choice: heuristic");
  }
  ~Rotation() {
    for (void* p : memory_) ctx_.release(p);
  }
  Rotation(const Rotation&) = delete;
  Rotation& operator=(const Rotation&) = delete;
  const Operands& next() { return all_[at_++ % all_.size()]; }

 private:
  /// A copy of what lies there: zeros would run faster than real values.
  void* take(const void* like, std::int64_t bytes) {
    void* base = ctx_.allocate(bytes + 256);
    if (base == nullptr) return nullptr;
    memory_.push_back(base);
    char* to = static_cast<char*>(base) + reinterpret_cast<std::uintptr_t>(like) % 256;
    check(cudaMemcpyAsync(to, like, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, ctx_.stream()), "copying");
    return to;
  }
  Context& ctx_;
  std::vector<void*> memory_;
  std::vector<Operands> all_;
  std::size_t at_ = 0;
};

GemmChoices::Choice timed(Context& ctx, Product& p, const Operands& o, std::span<const cublasLtMatmulHeuristicResult_t> proposals) {
  ctx.refuse_in_record("timing a product that no step before has run");
  Rotation rotation(ctx, o);
  Events events;
  void* workspace = ctx.scratch(product_scratch);
  std::vector<double> seconds;
  for (const cublasLtMatmulHeuristicResult_t& proposal : proposals) {
    p.algorithm = proposal.algo, p.workspace = proposal.workspaceSize;
    seconds.push_back(-1);
    if (proposal.state != CUBLAS_STATUS_SUCCESS || launch_product(ctx, p, rotation.next(), workspace) != CUBLAS_STATUS_SUCCESS) continue;
    const auto once = [&] { check(launch_product(ctx, p, rotation.next(), workspace), "timing a product"); };
    const double first = events.seconds(ctx, once);
    const int times = static_cast<int>(std::clamp(2e-3 / std::max(first, 1e-7), 2.0, 20.0));
    for (int round = 0; round < 3; ++round) {
      const double mean = events.seconds(ctx, [&] { for (int i = 0; i < times; ++i) once(); }) / times;
      if (round == 0 || mean < seconds.back()) seconds.back() = mean;
    }
  }
  const int best = fastest(seconds);
  if (best < 0) throw std::runtime_error("[gemm] none of cuBLASLt's algorithms for a product runs");
  const auto& chosen = proposals[static_cast<std::size_t>(best)];
  return {chosen.algo, chosen.workspaceSize, seconds[static_cast<std::size_t>(best)]};
}

}  // namespace

Product::~Product() {
  if (a != nullptr) cublasLtMatrixLayoutDestroy(a);
  if (b != nullptr) cublasLtMatrixLayoutDestroy(b);
  if (c != nullptr) cublasLtMatrixLayoutDestroy(c);
  if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
}

std::string GemmCache::tune(Context& ctx, const std::string& file) {
  products.clear();
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, ctx.device()), "reading the GPU's properties");
  return choices.open(properties.name, cublasLtGetVersion(), file);
}

std::string words(std::initializer_list<std::int64_t> numbers) {
  std::string text;
  for (const std::int64_t n : numbers) text += ' ', text += std::to_string(n);
  return text;
}

cudaDataType_t product_type(Num num) {
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

std::uint32_t alignment_of(const void* p) {
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  return at == 0 ? 256 : static_cast<std::uint32_t>(std::min<std::uintptr_t>(256, at & (~at + 1)));
}

cublasLtMatrixLayout_t product_layout(Num num, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
  cublasLtMatrixLayout_t l = nullptr;
  check(cublasLtMatrixLayoutCreate(&l, product_type(num), static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), ld), "describing a matrix");
  return l;
}

bool choose_algorithm(Context& ctx, Product& p, const Operands& o, const std::string& kind, cublasStatus_t* status) {
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "choosing a product's algorithm");
  struct Destroy {
    cublasLtMatmulPreference_t preference;
    ~Destroy() { cublasLtMatmulPreferenceDestroy(preference); }
  } destroy{preference};
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), "choosing a product's algorithm");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(product_scratch));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(o.a));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(o.b));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, std::min(alignment_of(o.c), alignment_of(o.d)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(o.d));
  constexpr int most = 16;
  GemmChoices& choices = ctx.gemms().choices;
  cublasLtMatmulHeuristicResult_t found[most] = {};
  int count = 0;
  *status = cublasLtMatmulAlgoGetHeuristic(ctx.blas(), p.operation, p.a, p.b, p.c, p.c, preference, choices.on() ? most : 1, found, &count);
  if (*status == CUBLAS_STATUS_SUCCESS && count > 0) *status = found[0].state;
  p.there = *status == CUBLAS_STATUS_SUCCESS && count > 0;
  if (!p.there) return false;
  // The first of its list, unless choices are kept: one by the clock alone would change bits from run to run.
  p.algorithm = found[0].algo, p.workspace = found[0].workspaceSize;
  if (!choices.on()) return true;
  bool kept = false;
  const GemmChoices::Choice choice = choices.choose(kind, [&] { return timed(ctx, p, o, {found, static_cast<std::size_t>(count)}); }, kept);
  p.algorithm = choice.algorithm, p.workspace = choice.workspace;
  if (kept) {  // what a file says is not believed blindly
    cublasLtMatmulHeuristicResult_t checked{};
    const cublasStatus_t runs = cublasLtMatmulAlgoCheck(ctx.blas(), p.operation, p.a, p.b, p.c, p.c, &p.algorithm, &checked);
    if (runs != CUBLAS_STATUS_SUCCESS || checked.workspaceSize > choice.workspace || choice.workspace > static_cast<std::size_t>(product_scratch))
      throw std::runtime_error("[products] " + choices.file() + ": the algorithm kept for " + kind + " does not run here (status " +
                               std::to_string(static_cast<int>(runs)) + "): expected a file that this GPU and cuBLASLt wrote; delete it, or set run.gemm_choice: heuristic");
  }
  return true;
}

void run_product(Context& ctx, const Product& p, const Operands& o) {
  if (!ctx.asks(reinterpret_cast<std::uintptr_t>(&p) + o.add)) return;
  check(launch_product(ctx, p, o, p.workspace > 0 ? ctx.scratch(product_scratch) : nullptr), "running a product");
}

void add_bias(Context& ctx, Num num, std::int64_t m, std::int64_t n, void* c, const void* bias) {
  Broadcast s;
  s.rank = 2;
  s.shape[0] = m, s.shape[1] = n, s.a[0] = n, s.a[1] = 1, s.b[0] = 0, s.b[1] = 1;
  binary(ctx, BinaryOp::add, s, num, c, bias, c);
}

}  // namespace capstan::kernels::cuda
