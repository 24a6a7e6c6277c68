// defines: Context: what CPU kernels share: the thread count, cached GEMM primitives, scratch memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace capstan::kernels::cpu {

struct GemmCache;

/// Owned by a CPU device. Kernels are called from one thread at a time; they fan out over OpenMP.
class Context {
 public:
  explicit Context(int threads);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// Use as `#pragma omp parallel for num_threads(context.threads())`.
  int threads() const { return threads_; }
  /// 64-byte aligned scratch of at least `bytes` for thread `thread`; kept and reused, contents undefined.
  void* scratch(int thread, std::size_t bytes);
  /// Takes that for the first `count` threads, so that scratch() cannot fail inside a parallel region, which no error may
  /// leave. Throws std::bad_alloc.
  void reserve_scratch(int count, std::size_t bytes);
  GemmCache& gemms() { return *gemms_; }

 private:
  struct Scratch;
  int threads_;
  std::unique_ptr<Scratch[]> scratch_;
  std::unique_ptr<GemmCache> gemms_;
};

}  // namespace capstan::kernels::cpu
