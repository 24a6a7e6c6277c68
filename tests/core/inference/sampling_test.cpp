// What a sampling parameter may be, and how a refusal names it.
#include <capstan/inference.h>

#include <gtest/gtest.h>

#include <limits>

namespace capstan {
namespace {

/// What check_sampling() says about the parameters after `change`, or "".
template <class Change>
std::string refusal(Change change) {
  SamplingParams p;
  change(p);
  try {
    check_sampling(p, [](const std::string& name) { return "request 4, " + name; });
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::input);
    return e.what();
  }
  return "";
}

TEST(Sampling, TheEndsOfTheRangesAreTaken) {
  EXPECT_EQ(refusal([](auto&) {}), "");
  EXPECT_EQ(refusal([](auto& p) { p.temperature = 0, p.top_k = 0, p.top_p = 1, p.min_p = 0, p.max_tokens = 1; }), "");
  EXPECT_EQ(refusal([](auto& p) { p.temperature = 1e300, p.top_k = 1 << 30, p.top_p = 1e-300, p.min_p = 1, p.stop = {"x"}; }), "");
}

TEST(Sampling, WhatIsOutOfRangeIsNamedWithItsRange) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(refusal([](auto& p) { p.temperature = -1; }), "[request 4, temperature] expected a number of 0 or more, got -1");
  EXPECT_EQ(refusal([&](auto& p) { p.temperature = nan; }), "[request 4, temperature] expected a number of 0 or more, got nan");
  EXPECT_EQ(refusal([&](auto& p) { p.temperature = inf; }), "[request 4, temperature] expected a number of 0 or more, got inf");
  EXPECT_EQ(refusal([](auto& p) { p.top_k = -1; }), "[request 4, top_k] expected 0 (all tokens) or more, got -1");
  for (const double top_p : {0.0, 1.1, -0.5, nan}) EXPECT_NE(refusal([&](auto& p) { p.top_p = top_p; }).find("[request 4, top_p] expected"), std::string::npos) << top_p;
  for (const double min_p : {1.5, -0.5, nan}) EXPECT_NE(refusal([&](auto& p) { p.min_p = min_p; }).find("[request 4, min_p] expected"), std::string::npos) << min_p;
  EXPECT_EQ(refusal([](auto& p) { p.max_tokens = 0; }), "[request 4, max_tokens] expected 1 or more, got 0");
  EXPECT_EQ(refusal([](auto& p) { p.stop = {"end", ""}; }), "[request 4, stop] expected a text of at least one character, got an empty one");
}

}  // namespace
}  // namespace capstan
