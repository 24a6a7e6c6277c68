// In place of CUB's header: a stable sort by key.
#pragma once
#include <emulated.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cub {
struct DeviceRadixSort {
  template <class K, class V>
  static cudaError_t SortPairs(void* room, std::size_t& bytes, const K* keys_in, K* keys, const V* values_in, V* values, int n, int, int bits, cudaStream_t) {
    if (room == nullptr) return bytes = 1, cudaSuccess;
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    const K mask = bits >= 32 ? ~K(0) : (K(1) << bits) - 1;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return (keys_in[a] & mask) < (keys_in[b] & mask); });
    for (int i = 0; i < n; ++i) keys[i] = keys_in[order[static_cast<std::size_t>(i)]], values[i] = values_in[order[static_cast<std::size_t>(i)]];
    return cudaSuccess;
  }
};
}  // namespace cub
