// Offsets and lengths of ragged sequences, as cuDNN reads them.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/cudnn_attention.h>

namespace capstan::kernels::cuda {

namespace {

__global__ void ragged_offsets_kernel(const std::int32_t* __restrict__ starts, int sequences, int batch, int pitch, RaggedStrides strides, std::int32_t* __restrict__ to) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i > batch) return;
  const std::int32_t start = starts[min(i, sequences)];
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < strides.count) to[k * pitch + i] = static_cast<std::int32_t>(start * strides.strides[k]);
  if (i < batch) to[strides.count * pitch + i] = starts[min(i + 1, sequences)] - start;
}

}  // namespace

void ragged_offsets(Context& ctx, const std::int32_t* starts, std::int64_t sequences, std::int64_t batch, const RaggedStrides& strides, std::int32_t* to) {
  launch(ctx, Launch{static_cast<unsigned>(ceil_div(batch + 1, 128)), 1, 1, 128, 0}, "attention: offsets", ragged_offsets_kernel, starts, static_cast<int>(sequences),
         static_cast<int>(batch), static_cast<int>(ragged_pitch(batch)), strides, to);
}

}  // namespace capstan::kernels::cuda
