// defines: CUDA's words for a plain C++ compiler, so that kernels run on the CPU, thread by thread, and are tested on machines
// without a GPU. Included ahead of each kernel file (see CMakeLists.txt). One block at a time; the threads of a block take
// turns, changing at barriers and shuffles.
#pragma once
#define CAPSTAN_EMULATED_KERNELS 1
#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace capstan::emulated {

struct Index { unsigned x = 0, y = 0, z = 0; };
extern Index thread_index, block_index, grid_size, block_size;

/// Runs `thread` for every thread of every block. `kernel` tells kernels apart.
void launch(const void* kernel, dim3 grid, dim3 block, const std::function<void()>& thread);
void sync_threads();
/// Gives `value` to the warp and returns that of lane `from`, of this lane's own when there is no such lane.
std::uint64_t exchange(std::uint64_t value, int from);
int lane();

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace capstan::emulated

#define threadIdx ::capstan::emulated::thread_index
#define blockIdx ::capstan::emulated::block_index
#define gridDim ::capstan::emulated::grid_size
#define blockDim ::capstan::emulated::block_size

inline void __syncthreads() { capstan::emulated::sync_threads(); }
template <class T> T __shfl_down_sync(unsigned, T value, int step) { return capstan::emulated::shuffle(value, capstan::emulated::lane() + step); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return capstan::emulated::shuffle(value, capstan::emulated::lane() ^ mask); }
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected, unsigned long long value) {
  const unsigned long long old = *at;
  if (old == expected) *at = value;
  return old;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned old = *at;
  if (value > old) *at = value;
  return old;
}
inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
using std::isfinite;
inline void sincospi(double x, double* s, double* c) {
  constexpr double pi = 3.14159265358979323846;
  const double turns = x - 2 * std::nearbyint(x / 2);  // in [-1, 1], exact
  *s = std::sin(pi * turns), *c = std::cos(pi * turns);
}
