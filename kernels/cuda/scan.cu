// Running sums along one dimension. CUB's scan of a whole device adds floats in an order that differs from run to run; its
// scan of a block does not: a block walks along its column tile after tile, and carries the sum on.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/grid_plan.h>
#include <kernels/cuda/scan.h>

#include <cub/block/block_scan.cuh>

namespace capstan::kernels::cuda {

namespace {

/// A block for each of the outer * inner columns of a [outer, n, inner].
template <class T>
__global__ void __launch_bounds__(scan_threads) scan_by_block_kernel(std::int64_t n, std::int64_t inner, bool reverse, const T* __restrict__ a, T* __restrict__ out) {
  using C = Compute<T>;
  using Scan = cub::BlockScan<C, scan_threads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage room;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) / inner * n * inner + static_cast<std::int64_t>(blockIdx.x) % inner;
  C carried = 0;
  for (std::int64_t begin = 0; begin < n; begin += scan_threads * scan_items) {
    const std::int64_t first = begin + static_cast<std::int64_t>(threadIdx.x) * scan_items;
    const auto at = [&](std::int64_t i) { return column + (reverse ? n - 1 - i : i) * inner; };
    C v[scan_items], total;
#pragma unroll
    for (int k = 0; k < scan_items; ++k) v[k] = first + k < n ? widen(a[at(first + k)]) : C(0);
    Scan(room).InclusiveSum(v, v, total);
#pragma unroll
    for (int k = 0; k < scan_items; ++k)
      if (first + k < n) out[at(first + k)] = narrow<T>(carried + v[k]);
    carried += total;
    __syncthreads();  // the room is used again
  }
}

/// A thread for each column.
template <class T>
__global__ void scan_by_thread_kernel(std::int64_t columns, std::int64_t n, std::int64_t inner, bool reverse, const T* __restrict__ a, T* __restrict__ out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= columns) return;
  const std::int64_t column = i / inner * n * inner + i % inner;
  Compute<T> sum = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t at = column + (reverse ? n - 1 - j : j) * inner;
    sum += widen(a[at]);
    out[at] = narrow<T>(sum);
  }
}

}  // namespace

void scan_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, bool reverse, void* out) {
  if (outer * n * inner == 0) return;
  constexpr const char* name = "cumsum";
  const ScanPlan plan = plan_scan(outer, n, inner);
  const dim3 grid(static_cast<unsigned>(checked(name, plan.blocks).x));
  visit(num, [&]<class T>() {
    const T* from = static_cast<const T*>(a);
    if (plan.by_block) launch_block(ctx, name, scan_by_block_kernel<T>, grid, dim3(scan_threads), 0, n, inner, reverse, from, static_cast<T*>(out));
    else launch_block(ctx, name, scan_by_thread_kernel<T>, grid, dim3(scan_threads), 0, outer * inner, n, inner, reverse, from, static_cast<T*>(out));
  });
}

}  // namespace capstan::kernels::cuda
