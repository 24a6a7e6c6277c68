// defines: what the GPU tests of single kernels share: guarded and poisoned buffers, random inputs, comparison with f64
// references, timing. A plain program: it runs where only the driver and CUDA's libraries are.
#pragma once
#include <kernels/cuda/context.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace gpu_test {

using capstan::kernels::bf16;
using capstan::kernels::Num;
using capstan::kernels::cuda::check;
using capstan::kernels::cuda::Context;

template <class T> constexpr Num num_of();
template <> constexpr Num num_of<double>() { return Num::f64; }
template <> constexpr Num num_of<float>() { return Num::f32; }
template <> constexpr Num num_of<bf16>() { return Num::bf16; }
template <class T> const char* type_name() { return num_of<T>() == Num::f64 ? "f64" : num_of<T>() == Num::f32 ? "f32" : "bf16"; }

inline int failures = 0, passes = 0;
inline void report(bool good, const std::string& what, const std::string& detail = "") {
  if (good) ++passes;
  else ++failures;
  if (!good) std::printf("FAIL %s  %s\n", what.c_str(), detail.c_str());
  std::fflush(stdout);
}

/// n elements `shift` elements after a 256-byte boundary, with guards of 64 elements on both sides. Poisoned: every
/// bit 1, which is NaN in each floating type.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t n, std::int64_t shift = 0) : n_(n), shift_(shift), all_(n + shift + 2 * guard) {
    check(cudaMalloc(&base_, static_cast<std::size_t>(all_) * sizeof(T)), "test buffer");
    check(cudaMemset(base_, 0xff, static_cast<std::size_t>(all_) * sizeof(T)), "poison");
    check(cudaDeviceSynchronize(), "poison");  // kernels run in another stream
  }
  Buffer(const std::vector<T>& v, std::int64_t shift = 0) : Buffer(static_cast<std::int64_t>(v.size()), shift) { put(v); }
  ~Buffer() { cudaFree(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return base_ + guard + shift_; }
  std::int64_t size() const { return n_; }
  void put(const std::vector<T>& v) {
    check(cudaMemcpy(data(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    check(cudaDeviceSynchronize(), "upload");
  }
  void poison() {
    check(cudaMemset(data(), 0xff, static_cast<std::size_t>(n_) * sizeof(T)), "poison");
    check(cudaDeviceSynchronize(), "poison");
  }
  std::vector<T> get() const {
    std::vector<T> v(static_cast<std::size_t>(n_));
    check(cudaDeviceSynchronize(), "running");
    check(cudaMemcpy(v.data(), data(), v.size() * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return v;
  }
  /// Nothing outside the n elements was written.
  bool guarded() const {
    std::vector<unsigned char> v(static_cast<std::size_t>(all_) * sizeof(T));
    check(cudaDeviceSynchronize(), "running");
    check(cudaMemcpy(v.data(), base_, v.size(), cudaMemcpyDeviceToHost), "download");
    const std::size_t begin = static_cast<std::size_t>(guard + shift_) * sizeof(T), end = begin + static_cast<std::size_t>(n_) * sizeof(T);
    for (std::size_t i = 0; i < v.size(); ++i)
      if ((i < begin || i >= end) && v[i] != 0xff) return false;
    return true;
  }

 private:
  static constexpr std::int64_t guard = 64;
  std::int64_t n_, shift_, all_;
  T* base_ = nullptr;
};

template <class T>
std::vector<T> random_values(std::int64_t n, std::uint64_t seed, double spread = 1, double centre = 0) {
  std::mt19937_64 g(seed);
  std::normal_distribution<double> normal(centre, spread);
  std::vector<T> v(static_cast<std::size_t>(n));
  for (T& x : v) x = static_cast<T>(static_cast<float>(normal(g)));
  return v;
}
/// Random, but quick to make: a million values over and over.
template <class T>
std::vector<T> many_values(std::int64_t n, std::uint64_t seed, double spread = 1) {
  const auto some = random_values<T>(std::min<std::int64_t>(n, (1 << 20) + 7), seed, spread);
  std::vector<T> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); i += some.size()) std::memcpy(&v[i], some.data(), std::min(some.size(), v.size() - i) * sizeof(T));
  return v;
}
template <class T> double value(T x) { if constexpr (std::is_same_v<T, bf16>) return static_cast<float>(x); else return static_cast<double>(x); }
template <class T>
std::vector<double> wide(const std::vector<T>& v) {
  std::vector<double> w(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) w[i] = value(v[i]);
  return w;
}
inline double rounded(double x) { return static_cast<float>(bf16(static_cast<float>(x))); }

/// |out - ref| <= relative |ref| + absolute for every element; NaN never passes.
template <class T>
void near(const std::string& what, const std::vector<T>& out, const std::vector<double>& ref, double relative, double absolute) {
  double worst = 0;
  std::size_t at = 0;
  bool good = out.size() == ref.size();
  for (std::size_t i = 0; i < ref.size() && good; ++i) {
    const double o = value(out[i]), excess = std::abs(o - ref[i]) - relative * std::abs(ref[i]) - absolute;
    if (!(excess <= 0)) {
      if (!std::isfinite(o) || excess > worst) worst = std::isfinite(o) ? excess : 1e30, at = i;
      if (!std::isfinite(o)) break;
    }
  }
  char detail[160];
  std::snprintf(detail, sizeof detail, "element %zu of %zu: got %.9g, expected %.9g", at, ref.size(), good && !out.empty() ? value(out[at]) : 0.0, ref.empty() ? 0.0 : ref[at]);
  report(good && worst == 0, what, detail);
}
/// One rounding of the type away from a sum in the compute type.
template <class T>
void near_rounded(const std::string& what, const std::vector<T>& out, const std::vector<double>& ref, double slack) {
  const double relative = num_of<T>() == Num::bf16 ? 1.0 / 256 : num_of<T>() == Num::f32 ? 4e-6 : 1e-13;
  near(what, out, ref, relative, slack * (num_of<T>() == Num::f64 ? 1e-9 : 1));
}
template <class T>
void same_bits(const std::string& what, const std::vector<T>& a, const std::vector<T>& b) {
  report(a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0, what, "two runs differ");
}

/// small: shapes that an emulated GPU gets through.
void test_rows(Context& ctx, bool small);
void test_scores(Context& ctx, bool small);
void test_attention(Context& ctx, bool small);
void test_fp8(Context& ctx, bool small);
void bench_attention(Context& ctx, bool small);

}  // namespace gpu_test
