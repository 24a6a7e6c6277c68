// defines: Rng: random numbers by address (seed, stream name, logical index, step), the same on every
// mesh and device. Philox4x32-10 (Salmon et al., SC 2011); normals by AS241 (Wichura 1988).
#pragma once
#include <capstan/export.h>
#include <capstan/kernels/philox.h>

#include <cstdint>
#include <string_view>

namespace capstan {

/// FNV-1a, 64 bits: stream names become numbers by it.
constexpr std::uint64_t hash_name(std::string_view name) {
  std::uint64_t h = 14695981039346656037ull;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

/// A cheap value. Element i of stream `name` at `step` is a pure function of (seed, name, i, step).
class Rng {
 public:
  Rng(std::uint64_t seed, std::string_view name, std::uint64_t step = 0)
      : key_(kernels::mix64(seed ^ hash_name(name))), step_(step) {}
  std::uint32_t bits(std::uint64_t index) const { return kernels::philox_u32(key_, step_, index); }
  double uniform(std::uint64_t index) const { return kernels::philox_uniform(key_, step_, index); }  ///< (0, 1)
  double normal(std::uint64_t index) const { return kernels::philox_normal(key_, step_, index); }
  /// Uniform in [0, n), without bias that matters: 64 bits by multiplication.
  std::uint64_t below(std::uint64_t index, std::uint64_t n) const {
    const std::uint64_t x = (std::uint64_t{bits(2 * index)} << 32) | bits(2 * index + 1);
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(x) * n) >> 64);
  }
  std::uint64_t key() const { return key_; }
  std::uint64_t step() const { return step_; }

 private:
  std::uint64_t key_, step_;
};

}  // namespace capstan
