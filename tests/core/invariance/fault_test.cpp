// Ranks that should hold equal parameters and do not are found and named.
#include "core/invariance/support.h"

#include "train/session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

namespace capstan::invariance {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// Flips one bit of a parameter's master on one rank of a fresh engine; what the look at it says on every rank.
std::vector<std::string> after_a_flip(const Layout& layout, int rank, const std::string& parameter) {
  std::vector<std::string> heard(static_cast<std::size_t>(layout.world()));
  on_ranks(layout, {overrides_of("llama")[0]}, [&](train::Session& session) {
    Engine& engine = *session.engine;
    engine.initialize();
    EXPECT_EQ(engine.disagreement(), "");
    if (session.rank() == rank)
      for (const NamedTensor& t : engine.tensors(false))
        if (t.name == "model/" + parameter) {
          static_cast<unsigned char*>(t.value.raw())[5] ^= 4;
          break;
        }
    heard[static_cast<std::size_t>(session.rank())] = engine.disagreement();
  });
  return heard;
}

TEST(Disagreement, OneReplicaOfFourIsNamed) {
  for (const std::string& text : after_a_flip({1, 4, 2, 1, 1}, 4, "layers.0.attention.qkv.weight"))
    EXPECT_THAT(text, AllOf(HasSubstr("layers.0.attention.qkv.weight"), HasSubstr("rank 4 (4 ranks")));
}

TEST(Disagreement, OfTwoReplicasBothAreNamed) {
  for (const std::string& text : after_a_flip({1, 2, 1, 1, 1}, 1, "layers.1.mlp.down.weight"))
    EXPECT_THAT(text, AllOf(HasSubstr("layers.1.mlp.down.weight"), HasSubstr("ranks 0, 1")));
}

TEST(Disagreement, WholeCopiesOfPlainDataParallelism) {
  for (const std::string& text : after_a_flip({1, 1, 4, 1, 1, "ddp"}, 2, "head.weight"))
    EXPECT_THAT(text, AllOf(HasSubstr("head.weight"), HasSubstr("rank 2 (4 ranks")));
}

TEST(Disagreement, WhatTensorRanksHoldTogether) {
  // A norm is whole on each tensor rank, and here in pieces over two shard ranks as well.
  for (const std::string& text : after_a_flip({1, 1, 2, 1, 4}, 3, "layers.2.mlp.norm.weight"))
    EXPECT_THAT(text, AllOf(HasSubstr("layers.2.mlp.norm.weight"), HasSubstr("rank 3 (4 ranks")));
}

TEST(Disagreement, APieceThatNobodyElseHoldsCannotBeCompared) {
  for (const std::string& text : after_a_flip({1, 1, 4, 1, 1}, 2, "layers.0.attention.qkv.weight")) EXPECT_EQ(text, "");
}

}  // namespace
}  // namespace capstan::invariance
