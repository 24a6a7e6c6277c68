// Muon: updates are near-orthogonal, parts stand alone, and all that is no hidden matrix goes to the other rule.
#include "workbench.h"

#include <gtest/gtest.h>

#include <cmath>

namespace capstan::test {
namespace {

/// Singular values of a row-major matrix by one-sided Jacobi rotations (Hestenes 1958).
std::vector<double> singular_values(std::vector<double> a, std::size_t rows, std::size_t columns) {
  if (rows < columns) {
    std::vector<double> t(a.size());
    for (std::size_t i = 0; i < rows; ++i) for (std::size_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
    a = t;
    std::swap(rows, columns);
  }
  for (int sweep = 0; sweep < 60; ++sweep) {
    double off = 0;
    for (std::size_t p = 0; p < columns; ++p) {
      for (std::size_t q = p + 1; q < columns; ++q) {
        double pp = 0, qq = 0, pq = 0;
        for (std::size_t i = 0; i < rows; ++i) {
          pp += a[i * columns + p] * a[i * columns + p];
          qq += a[i * columns + q] * a[i * columns + q];
          pq += a[i * columns + p] * a[i * columns + q];
        }
        if (std::abs(pq) <= 1e-15 * std::sqrt(pp * qq)) continue;
        off += std::abs(pq);
        const double zeta = (qq - pp) / (2 * pq), t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t), s = c * t;
        for (std::size_t i = 0; i < rows; ++i) {
          const double x = a[i * columns + p], y = a[i * columns + q];
          a[i * columns + p] = c * x - s * y, a[i * columns + q] = s * x + c * y;
        }
      }
    }
    if (off == 0) break;
  }
  std::vector<double> values;
  for (std::size_t j = 0; j < columns; ++j) {
    double n = 0;
    for (std::size_t i = 0; i < rows; ++i) n += a[i * columns + j] * a[i * columns + j];
    values.push_back(std::sqrt(n));
  }
  return values;
}

/// What one step subtracts from the values with lr 1 and no decay.
std::vector<double> direction(Workbench& bench, const Overrides& more, const ParameterSpec& spec, DType dtype, const std::string& name = "p") {
  Overrides options{{"lr", "1"}, {"weight_decay", "0"}};
  options.insert(options.end(), more.begin(), more.end());
  const auto optimizer = bench.make("muon", options);
  Subject s = bench.subject(*optimizer, name, spec, dtype);
  s.item.value.fill(0);
  bench.draw_gradient(s, 1);
  bench.update(*optimizer, {&s}, 1);
  std::vector<double> d = s.values();
  for (double& x : d) x = -x;
  return d;
}

TEST(Muon, BringsSingularValuesNearOne) {
  Workbench bench;
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{24, 40}, {40, 24}, {16, 64}, {1, 9}};
  for (const auto& [rows, columns] : shapes) {
    const double scale = std::sqrt(std::max(1.0, static_cast<double>(rows) / static_cast<double>(columns)));
    for (const DType dtype : {DType::f32, DType::f64}) {
      const auto values = singular_values(direction(bench, {}, spec_of({rows}, columns), dtype), static_cast<std::size_t>(rows),
                                          static_cast<std::size_t>(columns));
      for (const double s : values) {
        EXPECT_GT(s / scale, 0.6) << rows << " x " << columns;
        EXPECT_LT(s / scale, 1.25) << rows << " x " << columns;
      }
    }
  }
}

TEST(Muon, AGradientItselfIsFarFromOrthogonal) {
  // Were the update the plain normalized gradient, its singular values would be far below 1: the test above can fail.
  Workbench bench;
  const Rng rng(11, "p/grad", 1);
  const auto values = singular_values(Subject::numbers(bench.normals(rng, {24, 40}, DType::f64)), 24, 40);
  double norm = 0;
  for (const double s : values) norm += s * s;
  for (const double s : values) EXPECT_LT(s / std::sqrt(norm), 0.6);
}

TEST(Muon, ScalesToTheSizeOfAdamWsUpdates) {
  Workbench bench;
  const auto d = direction(bench, {{"scale", "rms"}}, spec_of({48}, 96), DType::f64);
  double squares = 0;
  for (const double x : d) squares += x * x;
  const double rms = std::sqrt(squares / static_cast<double>(d.size()));
  // An exactly orthogonal [48, 96] has rms sqrt(48 / (48 * 96)); times 0.2 sqrt(96) that is 0.2.
  EXPECT_NEAR(rms, 0.2, 0.05);
}

TEST(Muon, PartsStandAlone) {
  Workbench bench;
  const std::vector<std::int64_t> parts{8, 4, 4};
  const auto optimizer = bench.make("muon", {});
  Subject fused = bench.subject(*optimizer, "p", spec_of(parts, 6), DType::f32);
  bench.draw_gradient(fused, 1);
  std::vector<Subject> apart;
  std::int64_t row = 0;
  for (const std::int64_t rows : parts) {
    Subject s = bench.subject(*optimizer, "piece", spec_of({rows}, 6), DType::f32);
    s.item.value.copy_from(fused.item.value.narrow(0, row, rows));
    s.item.grad.copy_from(fused.item.grad.narrow(0, row, rows));
    apart.push_back(std::move(s));
    row += rows;
  }
  bench.update(*optimizer, {&fused}, 1);
  bench.update(*optimizer, {&apart[0], &apart[1], &apart[2]}, 1);
  row = 0;
  for (const Subject& s : apart) {
    EXPECT_EQ(Subject::numbers(fused.item.value.narrow(0, row, s.item.value.size(0))), s.values());
    row += s.item.value.size(0);
  }
  // One matrix of the same size is another update: the parts were indeed cut.
  Subject whole = bench.subject(*optimizer, "p", spec_of({16}, 6), DType::f32);
  bench.draw_gradient(whole, 1);
  bench.update(*optimizer, {&whole}, 1);
  EXPECT_GT(difference(whole.values(), fused.values()), 1e-3);
}

TEST(Muon, AHugeGradientInOnePartDoesNotTouchAnother) {
  Workbench bench;
  const auto optimizer = bench.make("muon", {});
  std::vector<double> calm;
  for (const double factor : {1.0, 1e6}) {
    Subject s = bench.subject(*optimizer, "p", spec_of({5, 7}, 6), DType::f32);
    bench.draw_gradient(s, 1);
    const Tensor first = s.item.grad.narrow(0, 0, 5);
    for (std::int64_t i = 0; i < 30; ++i) first.data<float>()[i] *= static_cast<float>(factor);
    bench.update(*optimizer, {&s}, 1);
    const auto second = Subject::numbers(s.item.value.narrow(0, 5, 7));
    if (calm.empty()) calm = second;
    EXPECT_EQ(second, calm);
  }
}

TEST(Muon, TakesPartsAlongColumnsAndOneMatrixForEachExpert) {
  Workbench bench;
  const auto optimizer = bench.make("muon", {});
  ParameterSpec spec;  // two experts of [4, 3 + 6]
  spec.dims = {{Segment{"experts", 2, 1, ""}}, {Segment{"out", 4, 1, ""}}, {Segment{"in", 3, 1, "a"}, Segment{"in", 6, 1, "b"}}};
  Subject all = bench.subject(*optimizer, "p", spec, DType::f32);
  bench.draw_gradient(all, 1);
  std::vector<Subject> apart;
  const auto block = [](const Tensor& t, std::int64_t e, std::int64_t begin, std::int64_t length) {
    return t.narrow(0, e, 1).narrow(2, begin, length).contiguous().view({4, length});
  };
  const std::pair<std::int64_t, std::int64_t> columns[] = {{0, 3}, {3, 6}};
  for (const std::int64_t e : {0, 1}) {
    for (const auto& [begin, length] : columns) {
      Subject s = bench.subject(*optimizer, "piece", spec_of({4}, length), DType::f32);
      s.item.value.copy_from(block(all.item.value, e, begin, length));
      s.item.grad.copy_from(block(all.item.grad, e, begin, length));
      bench.update(*optimizer, {&s}, 1);
      apart.push_back(std::move(s));
    }
  }
  bench.update(*optimizer, {&all}, 1);
  std::size_t n = 0;
  for (const std::int64_t e : {0, 1}) {
    for (const auto& [begin, length] : columns) {
      EXPECT_EQ(Subject::numbers(block(all.item.value, e, begin, length)), apart[n++].values());
    }
  }
}

TEST(Muon, GivesAllElseToTheOtherRule) {
  Workbench bench;
  const auto muon = bench.make("muon", {{"rest", "{plugin: adamw, lr: 0.02, weight_decay: 0.3}"}});
  const auto adamw = bench.make("adamw", {{"lr", "0.02"}, {"weight_decay", "0.3"}});
  const std::pair<Role, std::int64_t> others[] = {{Role::embedding, 6}, {Role::head, 6}, {Role::router, 6}, {Role::vector, 0}};
  for (const auto& [role, columns] : others) {
    Subject a = bench.subject(*muon, "p", spec_of({8}, columns, role), DType::f32);
    Subject b = bench.subject(*adamw, "p", spec_of({8}, columns, role), DType::f32);
    ASSERT_EQ(a.item.state.size(), 2u);
    EXPECT_EQ(muon->atomicity(*a.parameter), Atomicity::element);
    for (int step = 1; step <= 3; ++step) {
      for (Subject* s : {&a, &b}) bench.draw_gradient(*s, step);
      bench.update(*muon, {&a}, step, 0.5, 0.7);
      bench.update(*adamw, {&b}, step, 0.5, 0.7);
    }
    EXPECT_EQ(a.values(), b.values()) << name_of(role);
  }
  const Parameter hidden("h", spec_of({8}, 6));
  EXPECT_EQ(muon->atomicity(hidden), Atomicity::tensor);
  EXPECT_EQ(muon->state_of(hidden).size(), 1u);
}

TEST(Muon, LeavesAMatrixAloneWhoseGradientIsZero) {
  Workbench bench;
  const auto optimizer = bench.make("muon", {{"weight_decay", "0"}});
  Subject s = bench.subject(*optimizer, "p", spec_of({4}, 5), DType::f32);
  const auto before = s.values();
  bench.update(*optimizer, {&s}, 1);
  EXPECT_EQ(s.values(), before);
}

TEST(Muon, RefusesAShard) {
  Workbench bench;
  const auto optimizer = bench.make("muon", {});
  Subject s = bench.subject(*optimizer, "culprit", spec_of({8}, 6), DType::f32);
  s.item.value = s.item.value.narrow(0, 0, 4), s.item.grad = s.item.grad.narrow(0, 0, 4);
  s.item.state[0] = s.item.state[0].narrow(0, 0, 4);
  try {
    bench.update(*optimizer, {&s}, 1);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::programming);
    EXPECT_NE(std::string(e.what()).find("must be whole"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace capstan::test
