// Every rule against numbers of torch.optim: tests/reference/optimizers.py says how they were made.
#include "workbench.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <support/tolerance.h>

#include <fstream>

namespace capstan::test {
namespace {

nlohmann::json reference() {
  std::ifstream file(CAPSTAN_SOURCE_DIR "/tests/reference/optimizers.json");
  return nlohmann::json::parse(file);
}

/// The largest difference over all parameters of a case.
double run(const nlohmann::json& all, const nlohmann::json& one, DType dtype, const Overrides& more = {}) {
  Workbench bench;
  Overrides options = more;
  for (const auto& [key, value] : one.at("options").items()) {
    options.emplace_back(key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  const auto optimizer = bench.make(one.at("plugin"), options);
  const auto seed = all.at("seed").get<std::uint64_t>();
  double worst = 0;
  for (const auto& p : one.at("parameters")) {
    Subject s = bench.subject(*optimizer, p.at("name"), spec_of(p.at("parts"), p.at("columns")), dtype, seed);
    for (std::int64_t step = 1; step <= all.at("steps").get<std::int64_t>(); ++step) {
      bench.draw_gradient(s, step, seed);
      bench.update(*optimizer, {&s}, step, 1 - static_cast<double>(step) / 16);
    }
    const double d = difference(s.values(), p.at("values").get<std::vector<double>>());
    EXPECT_EQ(d, d) << one.at("name") << ", " << p.at("name") << ": not a number";
    worst = std::max(worst, d);
  }
  return worst;
}

TEST(AgainstPyTorch, EveryCaseInF64) {
  const auto all = reference();
  ASSERT_EQ(all.at("cases").size(), 7u);
  for (const auto& one : all.at("cases")) EXPECT_LT(run(all, one, DType::f64), bounds::eight_updates(DType::f64)) << one.at("name");
}

TEST(AgainstPyTorch, EveryCaseInF32) {
  const auto all = reference();
  for (const auto& one : all.at("cases")) EXPECT_LT(run(all, one, DType::f32), bounds::eight_updates(DType::f32)) << one.at("name");
}

TEST(AgainstPyTorch, ASlightlyDifferentRuleShows) {
  const auto all = reference();
  for (const auto& one : all.at("cases")) {
    auto changed = one;
    changed["options"]["lr"] = one.at("options").at("lr").get<double>() * 1.001;
    EXPECT_GT(run(all, changed, DType::f32), bounds::eight_updates(DType::f32)) << one.at("name");
  }
}

}  // namespace
}  // namespace capstan::test
