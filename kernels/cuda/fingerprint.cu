// Fingerprints of tensors: each thread adds its elements' parts, the host adds the threads' sums. Integers: any order is the
// same.
#include <kernels/cuda/fingerprint.h>
#include <kernels/cuda/grid_plan.h>
#include <kernels/shared/fingerprint.h>

#include <numeric>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

constexpr int threads = 256;

template <class Bits>
__global__ void fingerprint_kernel(std::int64_t n, const Bits* data, std::uint64_t first, std::uint64_t* sums) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  std::uint64_t total = 0;
  for (std::int64_t i = at; i < n; i += static_cast<std::int64_t>(gridDim.x) * threads)
    total += fingerprint_of(data[i], first + static_cast<std::uint64_t>(i));
  sums[at] = total;
}

}  // namespace

std::uint64_t fingerprint(Context& ctx, Num num, std::int64_t n, const void* data, std::uint64_t first) {
  if (n == 0) return 0;
  Launch l;
  l.grid_x = static_cast<unsigned>(fingerprint_blocks(n).x), l.block = threads;
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(l.grid_x) * threads);
  const std::size_t bytes = sums.size() * sizeof(std::uint64_t);
  auto* room = static_cast<std::uint64_t*>(ctx.scratch(static_cast<std::int64_t>(bytes)));
  const auto run = [&]<class Bits>(const Bits* from) {
    launch(ctx, l, "fingerprint", fingerprint_kernel<Bits>, n, from, first, room);
  };
  switch (bytes_of(num)) {
    case 8:
      run(static_cast<const std::uint64_t*>(data));
      break;
    case 4:
      run(static_cast<const std::uint32_t*>(data));
      break;
    default:
      run(static_cast<const std::uint16_t*>(data));
  }
  check(cudaMemcpyAsync(sums.data(), room, bytes, cudaMemcpyDeviceToHost, ctx.stream()), "reading fingerprints");
  check(cudaStreamSynchronize(ctx.stream()), "making fingerprints");
  return std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
}

}  // namespace capstan::kernels::cuda
