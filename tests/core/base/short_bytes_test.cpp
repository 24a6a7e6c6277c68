#include "base/short_bytes.h"

#include <gtest/gtest.h>

#include <string>
#include <tuple>

namespace capstan {
namespace {

constexpr double kib = 1024, mib = 1024 * kib, gib = 1024 * mib;

TEST(ShortBytes, ThreeDigits) {
  EXPECT_EQ(short_bytes(0), "0 B");
  EXPECT_EQ(short_bytes(512), "512 B");
  EXPECT_EQ(short_bytes(2048), "2.00 KiB");
  EXPECT_EQ(short_bytes(mib), "1.00 MiB");
  EXPECT_EQ(short_bytes(38.26 * mib), "38.3 MiB");
  EXPECT_EQ(short_bytes(300 * mib), "300 MiB");
  EXPECT_EQ(short_bytes(3.4 * gib), "3.40 GiB");
  EXPECT_EQ(short_bytes(141 * gib), "141 GiB");
  EXPECT_EQ(short_bytes(2.5 * 1024 * gib), "2.50 TiB");
}

// Neither "1000 MiB" nor "1024 MiB", and no digit too many where rounding carries.
TEST(ShortBytes, BordersOfUnitsAndDigits) {
  EXPECT_EQ(short_bytes(999), "999 B");
  EXPECT_EQ(short_bytes(1000), "0.98 KiB");
  EXPECT_EQ(short_bytes(1023), "1.00 KiB");
  EXPECT_EQ(short_bytes(9.994 * kib), "9.99 KiB");
  EXPECT_EQ(short_bytes(9.996 * kib), "10.0 KiB");
  EXPECT_EQ(short_bytes(99.94 * mib), "99.9 MiB");
  EXPECT_EQ(short_bytes(99.96 * mib), "100 MiB");
  for (const auto& [unit, name, next] : {std::tuple{kib, "KiB", "MiB"}, std::tuple{mib, "MiB", "GiB"}, std::tuple{gib, "GiB", "TiB"}}) {
    EXPECT_EQ(short_bytes(999.4 * unit), std::string("999 ") + name);
    EXPECT_EQ(short_bytes(999.6 * unit), std::string("0.98 ") + next);
    EXPECT_EQ(short_bytes(1023.9 * unit), std::string("1.00 ") + next);
  }
  EXPECT_EQ(short_bytes(2048.0 * 1024 * 1024 * gib), "2048 PiB");  // there is no larger unit here
}

}  // namespace
}  // namespace capstan
