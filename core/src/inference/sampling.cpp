// The ranges of sampling parameters, for every engine and for the command line.
#include <capstan/inference.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace capstan {

void check_sampling(const SamplingParams& p, const std::function<std::string(const std::string&)>& where) {
  // Each condition is what must hold, so that what is not a number fails it.
  const auto expect = [&](bool holds, const char* name, const char* range, auto got) {
    if (!holds) fail(Fault::input, where(name), fmt::format("expected {}, got {}", range, got));
  };
  expect(p.temperature >= 0 && std::isfinite(p.temperature), "temperature", "a number of 0 or more", p.temperature);
  expect(p.top_k >= 0, "top_k", "0 (all tokens) or more", p.top_k);
  expect(p.top_p > 0 && p.top_p <= 1, "top_p", "a number above 0, at most 1 (all tokens)", p.top_p);
  expect(p.min_p >= 0 && p.min_p <= 1, "min_p", "a number from 0 (all tokens) to 1", p.min_p);
  expect(p.max_tokens >= 1, "max_tokens", "1 or more", p.max_tokens);
  expect(std::find(p.stop.begin(), p.stop.end(), "") == p.stop.end(), "stop", "a text of at least one character", "an empty one");
}

}  // namespace capstan
