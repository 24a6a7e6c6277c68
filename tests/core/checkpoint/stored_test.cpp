// Checkpoints written by earlier versions of the format, stored beside this file, still load bit for bit. Never
// write them anew: a version that stops loading is a version that users lose.
#include "support.h"

#include "checkpoint/run_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace capstan::checkpoint::testing {
namespace {

TEST(Stored, Version1Loads) {
  const auto folder = Path(CAPSTAN_SOURCE_DIR) / "tests/core/checkpoint/stored/version_1";
  EXPECT_THAT(verify(folder), ::testing::SizeIs(0));
  auto model = Model::mixed(1).blank();
  const auto loaded = load(folder, model.wanted(), make_format);
  EXPECT_EQ(loaded.step, 7);
  EXPECT_TRUE(model == Model::mixed(1));
  const auto state = RunState::parse(loaded.state_json, "stored");
  EXPECT_EQ(state.tokens, 7 * 4096);
  EXPECT_EQ(state.seed, 0xfedcba9876543210u);
}

}  // namespace
}  // namespace capstan::checkpoint::testing
