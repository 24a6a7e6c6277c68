// In place of CUB's header: sums over a block's threads, each of which has some neighbours.
#pragma once
#include <emulated.h>

namespace cub {
enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <class T, int Threads, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
 public:
  struct TempStorage { T sums[Threads]; };
  explicit BlockScan(TempStorage& room) : room_(room) {}
  template <int Items>
  void InclusiveSum(const T (&in)[Items], T (&out)[Items], T& total) {
    T sum = 0;
    for (int i = 0; i < Items; ++i) out[i] = sum += in[i];
    room_.sums[threadIdx.x] = sum;
    __syncthreads();
    T before = 0;
    total = 0;
    for (int t = 0; t < Threads; ++t) {
      if (t == static_cast<int>(threadIdx.x)) before = total;
      total += room_.sums[t];
    }
    for (int i = 0; i < Items; ++i) out[i] += before;
  }

 private:
  TempStorage& room_;
};
}  // namespace cub
