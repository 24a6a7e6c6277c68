#include "engine/reductions.h"

#include <kernels/cpu/context.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace capstan {

namespace {

template <class T>
double block_sum(const T* g, std::int64_t count) {
  double lanes[16] = {};  // fixed lanes, so that the compiler may use vectors without choosing an order
  const std::int64_t whole = count / 16 * 16;
  for (std::int64_t i = 0; i < whole; i += 16)
    for (std::int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<double>(g[i + l]) * static_cast<double>(g[i + l]);
  for (std::int64_t i = whole; i < count; ++i) lanes[i - whole] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
  double s = 0;
  for (const double x : lanes) s += x;
  return s;
}

template <class T>
double sum(const Tensor& flat) {
  constexpr std::int64_t block = 65536;
  const std::int64_t n = flat.numel(), blocks = (n + block - 1) / block;
  const T* g = flat.data<T>();
  std::vector<double> partial(static_cast<std::size_t>(blocks));
#pragma omp parallel for num_threads(flat.device().cpu().threads()) schedule(static) if (blocks > 1)
  for (std::int64_t b = 0; b < blocks; ++b) partial[static_cast<std::size_t>(b)] = block_sum(g + b * block, std::min(block, n - b * block));
  double total = 0;
  for (const double x : partial) total += x;
  return total;
}

template <class T>
void add(const Tensor& to, const Tensor& from) {
  T* a = to.data<T>();
  const T* b = from.data<T>();
  const std::int64_t n = to.numel();
#pragma omp parallel for simd num_threads(to.device().cpu().threads()) if (n > 65536)
  for (std::int64_t i = 0; i < n; ++i) a[i] += b[i];
}

template <class T>
bool finite(const Tensor& flat) {
  const T* p = flat.data<T>();
  bool all = true;
  for (std::int64_t i = 0; i < flat.numel(); ++i) all &= std::isfinite(p[i]);
  return all;
}

}  // namespace

double squared_norm(const Tensor& flat) {
  if (flat.is_meta() || flat.numel() == 0) return 0;
  return flat.dtype() == DType::f64 ? sum<double>(flat) : sum<float>(flat);
}

void accumulate(const Tensor& to, const Tensor& from) {
  if (to.is_meta()) return;
  if (to.dtype() == DType::f64) add<double>(to, from);
  else add<float>(to, from);
}

bool all_finite(const Tensor& flat) {
  if (flat.is_meta()) return true;
  return flat.dtype() == DType::f64 ? finite<double>(flat) : finite<float>(flat);
}

}  // namespace capstan
