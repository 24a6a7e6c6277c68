#include <kernels/cpu/context.h>
#include <kernels/cpu/gemm_cache.h>

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace capstan::kernels::cpu {

struct Context::Scratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(data); }
};

Context::Context(int threads)
    : threads_(threads < 1 ? 1 : threads),
      scratch_(new Scratch[static_cast<std::size_t>(threads_)]),
      gemms_(std::make_unique<GemmCache>()) {}

Context::~Context() = default;

void* Context::scratch(int thread, std::size_t bytes) {
  Scratch& s = scratch_[static_cast<std::size_t>(thread)];
  if (s.bytes < bytes) {
    std::free(s.data);
    // What is swept as whole panels lies on huge pages: fewer translations.
    constexpr std::size_t huge = std::size_t{2} << 20;
    const bool large = bytes >= huge / 4;
    const std::size_t unit = large ? huge : 4096, rounded = (bytes + unit - 1) / unit * unit;
    s.data = std::aligned_alloc(large ? huge : 64, rounded);
    if (large && s.data != nullptr) madvise(s.data, rounded, MADV_HUGEPAGE);
    if (s.data == nullptr) {
      s.bytes = 0;
      throw std::bad_alloc();
    }
    s.bytes = rounded;
  }
  return s.data;
}

void Context::reserve_scratch(int count, std::size_t bytes) {
  for (int thread = 0; thread < count; ++thread) scratch(thread, bytes);
}

}  // namespace capstan::kernels::cpu
