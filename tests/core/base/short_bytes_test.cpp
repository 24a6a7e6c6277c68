#include "base/short_bytes.h"

#include <gtest/gtest.h>

namespace capstan {
namespace {

TEST(ShortBytes, ThreeUnits) {
  EXPECT_EQ(short_bytes(0), "0 KiB");
  EXPECT_EQ(short_bytes(2048), "2 KiB");
  EXPECT_EQ(short_bytes(1 << 20), "1 MiB");
  EXPECT_EQ(short_bytes(300 << 20), "300 MiB");
  EXPECT_EQ(short_bytes(3.4 * (1 << 30)), "3.40 GiB");
}

}  // namespace
}  // namespace capstan
