// cuDNN's graphs as far as they can be checked without a GPU: every operation and the whole graph finalize.
#include <gtest/gtest.h>
#include <kernels/cuda/cudnn_attention.h>

namespace capstan::kernels::cuda {
namespace {

TEST(CudnnGraphs, FinalizeForEveryKindOfShape) {
  for (const std::int64_t window : {0, 64})
    for (const bool ragged : {false, true})
      for (const bool ordered : {false, true})
        for (const std::int64_t kv_heads : {8, 2, 1})
          for (const std::int64_t head_size : {16, 64, 80, 128, 256}) {
            CudnnShape s;
            s.batch = 4, s.length = 200, s.heads = 8, s.kv_heads = kv_heads, s.head_size = head_size, s.rows = 800, s.window = window;
            s.q_stride = s.k_stride = s.v_stride = s.dq_stride = s.dkv_stride = (8 + 2 * kv_heads) * head_size, s.out_stride = s.dout_stride = 8 * head_size;
            s.ragged = ragged, s.ordered = ordered && !ragged, s.stats = true;
            EXPECT_NO_THROW(CudnnAttention::check_graphs(s)) << ragged << ordered << " " << kv_heads << " heads of " << head_size << " window " << window;
          }
}

TEST(CudnnGraphs, AHeadThatDoesNotFitItsProductIsRefused) {
  CudnnShape s;
  s.batch = 4, s.length = 200, s.heads = 8, s.kv_heads = 3, s.head_size = 64, s.rows = 800;
  s.q_stride = s.k_stride = s.v_stride = s.dq_stride = s.dkv_stride = 14 * 64, s.out_stride = s.dout_stride = 8 * 64, s.stats = true;
  EXPECT_THROW(CudnnAttention::check_graphs(s), std::exception);
}

}  // namespace
}  // namespace capstan::kernels::cuda
