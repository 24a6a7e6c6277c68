// defines: gemm() over cuBLASLt and the cache of its choices.
#pragma once
#include <kernels/cuda/context.h>
#include <kernels/cuda/gemm_choice.h>

#include <map>
#include <tuple>

namespace capstan::kernels::cuda {

/// C = op(A) op(B) (+ bias) (+ residual | + C), rows as in Gemm. bias [N] and residual [M, N] in c's type.
void gemm(Context& ctx, const Gemm& g, const void* a, const void* b, void* c, const void* bias, const void* residual);

/// FLOP/s of a large product, the best of a few.
double gemm_rate(Context& ctx, Num num);

/// Descriptors and the algorithm of each kind of product that was asked for.
struct GemmCache {
  using Key = std::tuple<int, int, int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t, std::int64_t, std::int64_t>;
  struct Entry {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    std::size_t workspace = 0;
  };
  std::map<Key, Entry> entries;
  GemmChoices choices;
  /// From here on products are timed (Queue::tune_products); what was chosen before is chosen again.
  std::string tune(Context& ctx, const std::string& file);
  ~GemmCache();
};

}  // namespace capstan::kernels::cuda
