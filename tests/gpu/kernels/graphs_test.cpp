// cuDNN's graphs as far as they can be checked without a GPU: every operation and the whole graph finalize.
#include <gtest/gtest.h>
#include <kernels/cuda/cudnn_attention.h>

#include <initializer_list>
#include <string>
#include <vector>

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

CudnnShape some_shape() {
  CudnnShape s;
  s.batch = 4, s.length = 200, s.heads = 8, s.kv_heads = 2, s.head_size = 64, s.rows = 800, s.stats = true;
  s.q_stride = s.k_stride = s.v_stride = s.dq_stride = s.dkv_stride = 12 * 64, s.out_stride = s.dout_stride = 8 * 64;
  return s;
}

TEST(CudnnGraphs, FinalizeWithMasksOfTheLastTile) {
  CudnnShape s = some_shape();
  s.padded = true;
  for (const bool ordered : {false, true}) {
    s.ordered = ordered;
    EXPECT_NO_THROW(CudnnAttention::check_graphs(s));
  }
}

/// Lists one after the other.
std::vector<std::string> joined(std::initializer_list<std::vector<std::string>> lists) {
  std::vector<std::string> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

const std::vector<std::string> ends{"index 2", "index 3", "lt", "lt", "and", "select"}, causal{"index 2", "index 3", "ge", "select"}, near{"index 2", "index 3", "add", "gt", "select"};

// Engines take the graph by its form: the operations and their order are those that NVIDIA's own front end composes.
TEST(CudnnGraphs, ForwardHasTheFormThatEnginesKnow) {
  CudnnShape s = some_shape();
  const std::vector<std::string> softmax{"most of", "sub", "exp", "sum of", "log", "add", "div"};
  EXPECT_EQ(CudnnAttention::operations(s), joined({{"product", "mul"}, causal, softmax, {"product"}}));
  s.ragged = true, s.window = 64;
  EXPECT_EQ(CudnnAttention::operations(s), joined({{"product padded", "mul"}, ends, causal, near, softmax, {"product"}}));
}

TEST(CudnnGraphs, BackwardHasTheFormThatEnginesKnow) {
  CudnnShape s = some_shape();
  s.backward = true;
  const std::vector<std::string> sums{"mul", "sum of", "mul"}, scores{"product", "mul"}, values{"exp", "reshape", "product", "sum of"},
      keys{"product", "sub", "mul", "mul", "reshape", "product", "sum of"};
  EXPECT_EQ(CudnnAttention::operations(s), joined({sums, scores, {"sub"}, causal, values, keys, {"reshape", "product", "identity"}}));
  s.ordered = true;
  EXPECT_EQ(CudnnAttention::operations(s), joined({sums, scores, {"sub"}, causal, values, keys, {"reshape", "product"}}));
  s.padded = true;
  EXPECT_EQ(CudnnAttention::operations(s), joined({sums, scores, ends, {"sub"}, causal, values, keys, {"reshape", "product"}}));
  s.padded = s.ordered = false, s.ragged = true, s.window = 64, s.kv_heads = 8;
  const std::vector<std::string> own_values{"exp", "reshape", "product"}, own_keys{"product", "sub", "mul", "mul", "reshape", "product"};
  EXPECT_EQ(CudnnAttention::operations(s), joined({sums, scores, ends, {"sub"}, causal, near, own_values, own_keys, {"reshape", "product", "identity"}}));
}

TEST(CudnnGraphs, AHeadThatDoesNotFitItsProductIsRefused) {
  CudnnShape s;
  s.batch = 4, s.length = 200, s.heads = 8, s.kv_heads = 3, s.head_size = 64, s.rows = 800;
  s.q_stride = s.k_stride = s.v_stride = s.dq_stride = s.dkv_stride = 14 * 64, s.out_stride = s.dout_stride = 8 * 64, s.stats = true;
  EXPECT_THROW(CudnnAttention::check_graphs(s), std::exception);
}

}  // namespace
}  // namespace capstan::kernels::cuda
