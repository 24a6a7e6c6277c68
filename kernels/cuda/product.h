// defines: Product, what cuBLASLt is told of one kind of product; GemmCache, the kinds that were asked for; what gemm() and
// gemm_fp8() share: choosing an algorithm, by the library's word or by the clock, and running it.
#pragma once
#include <kernels/cuda/context.h>
#include <kernels/cuda/gemm_choice.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>

namespace capstan::kernels::cuda {

/// Scratch that a product may use: above the 32 MiB that Hopper's and Blackwell's algorithms want.
inline constexpr std::int64_t product_scratch = std::int64_t{64} << 20;

/// cuBLASLt's D = op(A) op(B) + beta C: its matrices are column-major, so A is what callers multiply from the right.
struct Product {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  std::size_t workspace = 0;
  bool wide = false;   ///< alpha and beta are f64
  bool there = false;  ///< the library has an algorithm for it

  Product() = default;
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  ~Product();
  /// The library checks the size alone: T must be the attribute's type in cublasLt.h.
  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, T value) {
    check(cublasLtMatmulDescSetAttribute(operation, what, &value, sizeof value), "describing a product");
  }
};

/// What one run reads and writes, in cuBLASLt's order.
struct Operands {
  const void *a = nullptr, *b = nullptr;
  void* d = nullptr;
  const void* c = nullptr;  ///< added when `add`; may be d
  bool add = false;
  std::int64_t a_bytes = 0, b_bytes = 0, d_bytes = 0;  ///< from the first element to the last
};

struct GemmCache {
  /// All that tells one kind of product from another; places that a kind does not use are 0.
  using Key = std::array<std::int64_t, 24>;
  std::map<Key, Product> products;
  GemmChoices choices;
  /// From here on products are timed (Queue::tune_products); what was chosen before is chosen again.
  std::string tune(Context& ctx, const std::string& file);
};

/// Each with a blank before it, for a kind's name.
std::string words(std::initializer_list<std::int64_t> numbers);
cudaDataType_t product_type(Num num);
/// The largest power of two up to 256 that divides the address.
std::uint32_t alignment_of(const void* p);
cublasLtMatrixLayout_t product_layout(Num num, std::int64_t rows, std::int64_t cols, std::int64_t ld);
/// Gives p, described whole and with its pointers set, an algorithm: the library's first, or where choices are kept the one of
/// `kind`, which must tell this kind of product from all others. False when the library has none for it; then *status says why.
bool choose_algorithm(Context& ctx, Product& p, const Operands& o, const std::string& kind, cublasStatus_t* status);
void run_product(Context& ctx, const Product& p, const Operands& o);
/// Rows of C [m, n], which lie close together, plus bias [n], for what no epilogue takes.
void add_bias(Context& ctx, Num num, std::int64_t m, std::int64_t n, void* c, const void* bias);

/// Times what is queued.
struct Events {
  cudaEvent_t begin = nullptr, end = nullptr;
  Events() { check(cudaEventCreate(&begin), "making an event"), check(cudaEventCreate(&end), "making an event"); }
  ~Events() { cudaEventDestroy(begin), cudaEventDestroy(end); }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  /// Of what `work` queues.
  template <class F>
  double seconds(Context& ctx, F&& work) {
    check(cudaEventRecord(begin, ctx.stream()), "timing");
    work();
    check(cudaEventRecord(end, ctx.stream()), "timing");
    check(cudaEventSynchronize(end), "timing");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "timing");
    return 1e-3 * static_cast<double>(ms);
  }
};

}  // namespace capstan::kernels::cuda
