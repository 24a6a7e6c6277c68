// Launch plans of attention, and what is asked of cuDNN.
#include <gtest/gtest.h>
#include <kernels/cuda/attention_plan.h>
#include <kernels/cuda/cudnn_attention.h>

#include <vector>

namespace capstan::kernels::cuda {
namespace {

constexpr std::int64_t most_shared = 227 * 1024;  // of a block on sm_90 and sm_100

TEST(AttentionPlan, EveryHeadSizeFits) {
  for (std::int64_t d = 1; d <= 256; ++d)
    for (const int capability : {90, 100})
      for (const bool paged : {false, true}) {
        const AttentionPlan f = plan_attention_forward(d, paged, capability), kv = plan_attention_dkv(d), q = plan_attention_dq(d);
        for (const AttentionPlan& p : {f, kv, q}) {
          EXPECT_GE(p.width, d);
          EXPECT_EQ(p.width % 16, 0);
          EXPECT_LE(p.shared_bytes, most_shared);
          EXPECT_EQ(p.rows, p.warps / p.column_parts * p.strips * 16);
        }
        EXPECT_EQ(kv.width / kv.column_parts % 16, 0);
        if (capability >= 100 && f.strips == 2) {
          EXPECT_LE(f.width, 64) << "registers of sm_100";
        }
      }
  EXPECT_EQ(attention_width(257), 0);
  for (const std::int64_t d : {1, 64, 65, 128, 129, 256})
    for (const int bytes : {4, 8})
      for (const bool backward : {false, true}) {
        const PlainAttentionPlan p = plan_plain_attention(d, bytes, backward);
        EXPECT_GE(p.width, d);
        EXPECT_LE(p.shared_bytes, most_shared);
        EXPECT_EQ(attention_keys % p.tile, 0);
      }
}

TEST(AttentionPlan, TilesNeverSpanSequences) {
  const std::vector<std::int32_t> starts{0, 0, 1, 65, 193, 200};
  EXPECT_EQ(attention_tiles(starts.data(), 5, starts[5], 64), 0 + 1 + 1 + 2 + 1);
  EXPECT_EQ(attention_tiles(starts.data(), 5, starts[5], 128, 4), 0 + 1 + 2 + 4 + 1);
}

TEST(AttentionPlan, TilesOfACapacityServeEveryCutOfIt) {
  for (const std::int64_t rows : {16, 64, 128})
    for (const std::int64_t times : {1, 4})
      for (const std::vector<std::int32_t>& starts : {std::vector<std::int32_t>{0, 256, 256, 256, 256}, {0, 1, 2, 3, 256}, {0, 65, 130, 195, 256}, {0, 64, 128, 192, 256}, {0, 0, 0, 255, 256}})
        EXPECT_GE(attention_tiles(nullptr, 4, 256, rows, times), attention_tiles(starts.data(), 4, 256, rows, times));
  EXPECT_LE(attention_tiles(nullptr, 4, 256, 64), 256 / 64 + 4);
}

TEST(AttentionWindow, IsThereOnlyWhereItHidesAKey) {
  const std::vector<std::int32_t> starts{0, 3, 103, 110};
  EXPECT_EQ(attention_window(0, starts.data(), 3), 0);
  EXPECT_EQ(attention_window(1, starts.data(), 3), 1);
  EXPECT_EQ(attention_window(99, starts.data(), 3), 99);
  EXPECT_EQ(attention_window(100, starts.data(), 3), 0);
  EXPECT_EQ(attention_window(std::int64_t{1} << 40, starts.data(), 3), 0);
}

Attention shape(const std::vector<std::int32_t>& starts, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_size) {
  Attention a;
  a.num = Num::bf16, a.heads = heads, a.kv_heads = kv_heads, a.head_size = head_size;
  a.host_starts = starts.data(), a.sequences = static_cast<std::int64_t>(starts.size()) - 1, a.rows = starts.back();
  a.q_stride = a.k_stride = a.v_stride = a.dq_stride = a.dkv_stride = (heads + 2 * kv_heads) * head_size, a.out_stride = a.dout_stride = heads * head_size;
  return a;
}

TEST(CudnnShape, EqualSequencesAreABatchOthersAreRoundedUp) {
  const std::vector<std::int32_t> equal{0, 100, 200, 300}, ragged{0, 100, 201, 300}, longer{0, 3, 500, 513, 514, 520};
  const CudnnShape e = cudnn_shape(shape(equal, 8, 2, 64), false, false);
  EXPECT_FALSE(e.ragged);
  EXPECT_EQ(e.batch, 3);
  EXPECT_EQ(e.length, 100);
  const CudnnShape r = cudnn_shape(shape(ragged, 8, 2, 64), false, false), l = cudnn_shape(shape(longer, 8, 2, 64), false, false);
  EXPECT_TRUE(r.ragged);
  EXPECT_EQ(r.batch, 4);
  EXPECT_EQ(r.length, 128);
  EXPECT_EQ(l.batch, 8);
  EXPECT_EQ(l.length, 512);
}

TEST(CudnnShape, AWindowIsAPlanOfItsOwnWhereItHidesAKey) {
  const std::vector<std::int32_t> starts{0, 100, 200};
  Attention a = shape(starts, 8, 2, 64);
  const CudnnShape none = cudnn_shape(a, true, false);
  a.window = 99;
  EXPECT_EQ(cudnn_shape(a, true, false).window, 99);
  EXPECT_NE(cudnn_shape(a, true, false), none);
  a.window = 100;
  EXPECT_EQ(cudnn_shape(a, true, false), none);
}

TEST(CudnnRefuses, SaysWhatItDoesNotTake) {
  const std::vector<std::int32_t> starts{0, 100}, singles{0, 1, 2};
  Attention a = shape(starts, 8, 2, 64);
  EXPECT_EQ(cudnn_refuses(a, true, 90), "");
  EXPECT_NE(cudnn_refuses(shape(singles, 8, 2, 64), false, 90), "");
  EXPECT_NE(cudnn_refuses(shape(starts, 8, 2, 36), false, 90), "");
  EXPECT_EQ(cudnn_refuses(shape(starts, 8, 2, 256), true, 90), "");
  EXPECT_NE(cudnn_refuses(shape(starts, 8, 2, 256), true, 100), "");
  EXPECT_EQ(cudnn_refuses(shape(starts, 8, 2, 64), false, 100), "");
  EXPECT_NE(cudnn_refuses(shape(starts, 8, 2, 64), true, 100), "") << "in one order";
  a.any_order = true;
  EXPECT_EQ(cudnn_refuses(a, true, 100), "");
  const std::vector<std::int32_t> ragged{0, 100, 130};
  for (const std::int64_t size : {40, 48}) {
    Attention r = shape(ragged, 8, 2, size);
    r.any_order = true;
    EXPECT_EQ(cudnn_refuses(r, true, 90).empty(), size == 48) << size;
    EXPECT_EQ(cudnn_refuses(r, false, 90), "");
  }
  a.q_stride += 4;
  EXPECT_NE(cudnn_refuses(a, false, 90), "");
  a = shape(starts, 8, 2, 64), a.num = Num::f32;
  EXPECT_NE(cudnn_refuses(a, false, 90), "");
  a = shape(starts, 8, 2, 64), a.rows = std::int64_t{1} << 30;
  EXPECT_NE(cudnn_refuses(a, false, 90), "");
}

TEST(CudnnShape, OlderLibrariesMaskTheLastTileInTheGraph) {
  const std::vector<std::int32_t> whole{0, 256, 512}, cut{0, 200, 400}, ragged{0, 100, 201};
  for (const std::int64_t version : {91002, 91500, 91501, 91900}) {
    EXPECT_EQ(cudnn_wants_padding(cudnn_shape(shape(cut, 8, 2, 64), true, true), version), version <= 91500) << version;
    EXPECT_FALSE(cudnn_wants_padding(cudnn_shape(shape(whole, 8, 2, 64), true, false), version));
    EXPECT_FALSE(cudnn_wants_padding(cudnn_shape(shape(cut, 8, 2, 64), false, false), version));
    EXPECT_FALSE(cudnn_wants_padding(cudnn_shape(shape(ragged, 8, 2, 64), true, false), version)) << "it has its masks";
  }
}

// Plans that want more than was thought, by whatever factor: the pieces that are taken stay within the limit, or there are none.
TEST(CudnnFit, TakesTheLargestPiecesWhosePlansFit) {
  CudnnShape s;
  s.batch = 6, s.kv_heads = 8, s.heads = 32, s.length = 1000, s.head_size = 128;
  const double head = 4 * (1024 * 1024 * 2 + 2 * 1024 * 128 * 2);
  for (const double more : {0.5, 1.0, 1.7, 6.0, 100.0})
    for (const std::int64_t limit : {std::int64_t{1} << 22, std::int64_t{1} << 25, std::int64_t{1} << 28, std::int64_t{1} << 32})
      for (const bool ordered : {false, true}) {
        const auto wants = [&](const CudnnChunk& c) { return more * head * static_cast<double>(c.batch * c.kv_heads); };
        std::vector<std::int64_t> tried;
        const CudnnChunk c = cudnn_fit(s, ordered ? cudnn_ordered_chunk(s, limit) : CudnnChunk{6, 8}, [&](const CudnnChunk& piece) {
          EXPECT_EQ(s.kv_heads % piece.kv_heads, 0);
          EXPECT_EQ(s.batch % piece.batch, 0);
          tried.push_back(piece.batch * piece.kv_heads);
          return wants(piece) <= static_cast<double>(limit);
        });
        for (std::size_t i = 1; i < tried.size(); ++i) EXPECT_LT(tried[i], tried[i - 1]);
        if (c.kv_heads == 0) {
          EXPECT_GT(std::max(more, ordered ? 1.0 : 0.0) * head, static_cast<double>(limit));
        } else {
          EXPECT_LE(wants(c), static_cast<double>(limit));
          EXPECT_EQ(tried.back(), c.batch * c.kv_heads);
        }
      }
}

TEST(CudnnOrderedChunk, DividesTheWorkAndStaysWithinTheWorkspace) {
  for (const std::int64_t batch : {1, 6, 32})
    for (const std::int64_t kv_heads : {1, 5, 8})
      for (const std::int64_t group : {1, 4})
        for (const std::int64_t length : {100, 1024, 8192})
          for (const std::int64_t limit : {std::int64_t{1} << 24, std::int64_t{1} << 28, std::int64_t{1} << 30, std::int64_t{1} << 40}) {
            CudnnShape s;
            s.batch = batch, s.kv_heads = kv_heads, s.heads = kv_heads * group, s.length = length, s.head_size = 128;
            const CudnnChunk c = cudnn_ordered_chunk(s, limit);
            const std::int64_t one = group * length * length * 2;
            if (c.kv_heads == 0) {
              EXPECT_GT(one + one / 2, limit / 2) << length;  // not even one head fits
              continue;
            }
            EXPECT_EQ(kv_heads % c.kv_heads, 0);
            EXPECT_EQ(batch % c.batch, 0);
            EXPECT_LE(c.batch * c.kv_heads * one, limit);
            if (c.batch > 1) {
              EXPECT_EQ(c.kv_heads, kv_heads);
            }
            if (limit == std::int64_t{1} << 40) {
              EXPECT_EQ(c.batch * c.kv_heads, batch * kv_heads);
            }
          }
}

}  // namespace
}  // namespace capstan::kernels::cuda
