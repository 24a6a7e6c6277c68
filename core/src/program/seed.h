// defines: check_seed(): whether a word of the command line is a seed.
#pragma once
#include <charconv>
#include <cstdint>
#include <string>
#include <system_error>

namespace capstan::program {

/// For CLI11's check(), because CLI11 itself takes -1, and what is too large, for the largest number: what is wrong, or nothing.
inline std::string check_seed(const std::string& text) {
  std::uint64_t seed = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), seed);
  const bool good = problem == std::errc() && end == text.data() + text.size();
  return good ? std::string() : "expected an integer from 0 to 18446744073709551615, got " + text;
}

}  // namespace capstan::program
