// defines: shuffled(): a permutation that is computed, not stored.
#pragma once
#include <capstan/random.h>

#include <bit>
#include <cstdint>

namespace capstan::data {

/// Where index i of [0, n) goes in the permutation that `rng` names: a balanced Feistel network of six rounds on the
/// next even number of bits, walked until it lands below n (Black & Rogaway 2002). No memory, whatever n is.
inline std::int64_t shuffled(const Rng& rng, std::int64_t n, std::int64_t i) {
  if (n <= 1) return 0;
  const int half = (std::bit_width(static_cast<std::uint64_t>(n - 1)) + 1) / 2;
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  auto x = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = x >> half, right = x & mask;
    for (std::uint64_t round = 0; round < 6; ++round) {
      const std::uint64_t mixed = left ^ (rng.bits((round << 40) | right) & mask);
      left = right, right = mixed;
    }
    x = (left << half) | right;
  } while (x >= static_cast<std::uint64_t>(n));
  return static_cast<std::int64_t>(x);
}

}  // namespace capstan::data
