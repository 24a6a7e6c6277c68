// AdamW and SGD against plain derivations in f64, from the papers' formulas; clipping, sizes, threads, refusals.
#include "workbench.h"

#include <gtest/gtest.h>
#include <omp.h>
#include <support/tolerance.h>

#include <cmath>

namespace capstan::test {
namespace {

/// Adam as in Kingma & Ba 2015, algorithm 1, with the decay of Loshchilov & Hutter 2019 beside it.
struct PlainAdamW {
  double lr, beta1, beta2, epsilon, decay;
  std::vector<double> m, v;
  void step(std::vector<double>& p, const std::vector<double>& g, int t, double lr_scale) {
    m.resize(p.size()), v.resize(p.size());
    for (std::size_t i = 0; i < p.size(); ++i) {
      m[i] = beta1 * m[i] + (1 - beta1) * g[i];
      v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
      const double m_hat = m[i] / (1 - std::pow(beta1, t)), v_hat = v[i] / (1 - std::pow(beta2, t));
      p[i] -= lr_scale * lr * (m_hat / (std::sqrt(v_hat) + epsilon) + decay * p[i]);
    }
  }
};

/// The velocity form of Sutskever et al. 2013, on positions that already look ahead.
struct PlainSgd {
  double lr, momentum, decay;
  bool nesterov;
  std::vector<double> sum;
  void step(std::vector<double>& p, const std::vector<double>& g, int, double lr_scale) {
    sum.resize(p.size());
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double force = g[i] + decay * p[i];
      sum[i] = momentum * sum[i] + force;
      p[i] -= lr_scale * lr * (nesterov ? force + momentum * sum[i] : sum[i]);
    }
  }
};

/// Ten steps of a plugin and of its plain form side by side, gradients scaled as clipping would: largest difference.
template <class Plain>
double compare(const std::string& plugin, const Overrides& options, Plain plain, DType dtype, std::int64_t rows, std::int64_t columns) {
  Workbench bench;
  const auto optimizer = bench.make(plugin, options);
  Subject s = bench.subject(*optimizer, "p", spec_of({rows}, columns), dtype);
  std::vector<double> expected = s.values();
  for (int step = 1; step <= 10; ++step) {
    bench.draw_gradient(s, step);
    std::vector<double> g = Subject::numbers(s.item.grad);
    for (double& x : g) x *= 0.25;
    const double lr_scale = 1.0 / step;
    bench.update(*optimizer, {&s}, step, lr_scale, 0.25);
    plain.step(expected, g, step, lr_scale);
  }
  return difference(s.values(), expected);
}

const Overrides adamw{{"lr", "0.02"}, {"beta1", "0.85"}, {"beta2", "0.97"}, {"epsilon", "1e-6"}, {"weight_decay", "0.3"}};

TEST(AdamW, IsItsFormula) {
  // Odd sizes: vector bodies and tails; more than one block of 16384; a single element.
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{1, 1}, {3, 5}, {131, 257}};
  for (const auto& [rows, columns] : shapes) {
    const PlainAdamW plain{0.02, 0.85, 0.97, 1e-6, 0.3, {}, {}};
    for (const DType dtype : {DType::f64, DType::f32})
      EXPECT_LT(compare("adamw", adamw, plain, dtype, rows, columns), bounds::ten_updates(dtype)) << rows << " x " << columns << ", " << name_of(dtype);
  }
}

TEST(AdamW, DoesNotDecayVectors) {
  EXPECT_LT(compare("adamw", adamw, PlainAdamW{0.02, 0.85, 0.97, 1e-6, 0, {}, {}}, DType::f64, 9, 0), bounds::ten_updates(DType::f64));
  EXPECT_GT(compare("adamw", adamw, PlainAdamW{0.02, 0.85, 0.97, 1e-6, 0.3, {}, {}}, DType::f64, 9, 0), 1e-4);
}

TEST(AdamW, KeepsF32StateOfF64Values) {
  Workbench bench;
  const auto optimizer = bench.make("adamw", adamw);
  Subject wide = bench.subject(*optimizer, "p", spec_of({6}, 7), DType::f64), mixed = bench.subject(*optimizer, "p", spec_of({6}, 7), DType::f64);
  for (Tensor& t : mixed.item.state) t = t.to(DType::f32);
  for (int step = 1; step <= 5; ++step) {
    for (Subject* s : {&wide, &mixed}) bench.draw_gradient(*s, step);
    bench.update(*optimizer, {&wide, &mixed}, step);
  }
  const double d = difference(mixed.values(), wide.values());
  EXPECT_GT(d, 0);  // the moments were rounded,
  EXPECT_LT(d, 1e-7);  // and no more than that
}

TEST(Sgd, IsItsFormula) {
  const PlainSgd forms[] = {{0.05, 0, 0, false, {}}, {0.05, 0.9, 0.1, false, {}}, {0.05, 0.9, 0.1, true, {}}};
  for (const PlainSgd& plain : forms) {
    const Overrides options{{"lr", "0.05"}, {"momentum", plain.momentum == 0 ? "0" : "0.9"},
                            {"weight_decay", plain.decay == 0 ? "0" : "0.1"}, {"nesterov", plain.nesterov ? "true" : "false"}};
    const std::pair<std::int64_t, std::int64_t> shapes[] = {{1, 1}, {3, 5}, {131, 257}};
    for (const auto& [rows, columns] : shapes) {
      for (const DType dtype : {DType::f64, DType::f32}) EXPECT_LT(compare("sgd", options, plain, dtype, rows, columns), bounds::ten_updates(dtype)) << name_of(dtype);
    }
  }
}

TEST(Sgd, KeepsNoStateWithoutMomentum) {
  Workbench bench;
  const Parameter p("p", spec_of({3}, 3));
  EXPECT_TRUE(bench.make("sgd", {{"momentum", "0"}})->state_of(p).empty());
  EXPECT_EQ(bench.make("sgd", {{"momentum", "0.9"}})->state_of(p).size(), 1u);
}

TEST(Rules, TakeAnyPartOfATensor) {
  // What Atomicity::element promises to a sharding engine: two halves, updated apart, are the whole's bits.
  for (const std::string plugin : {"adamw", "sgd"}) {
    Workbench bench;
    const auto optimizer = bench.make(plugin, {});
    Subject whole = bench.subject(*optimizer, "p", spec_of({10}, 33), DType::f32), cut = bench.subject(*optimizer, "p", spec_of({10}, 33), DType::f32);
    EXPECT_EQ(optimizer->atomicity(*whole.parameter), Atomicity::element);
    for (int step = 1; step <= 3; ++step) {
      for (Subject* s : {&whole, &cut}) bench.draw_gradient(*s, step);
      bench.update(*optimizer, {&whole}, step);
      std::vector<UpdateItem> halves;
      const std::pair<std::int64_t, std::int64_t> parts[] = {{0, 17 * 8}, {17 * 8, 330 - 17 * 8}};
      for (const auto& [begin, length] : parts) {
        UpdateItem half{cut.parameter.get(), cut.item.value.view({330}).narrow(0, begin, length), cut.item.grad.view({330}).narrow(0, begin, length), {}};
        for (const Tensor& t : cut.item.state) half.state.push_back(t.view({330}).narrow(0, begin, length));
        halves.push_back(half);
      }
      optimizer->update({&bench.device(), step, 1, 1}, halves);
    }
    EXPECT_EQ(whole.values(), cut.values()) << plugin;
  }
}

TEST(Rules, DoNotDependOnThreads) {
  for (const std::string plugin : {"adamw", "sgd", "muon"}) {
    std::vector<double> first;
    for (const int threads : {1, 2, 3, 7}) {
      Workbench bench(threads);
      const int before = omp_get_max_threads();
      omp_set_num_threads(threads);
      const auto optimizer = bench.make(plugin, {});
      Subject s = bench.subject(*optimizer, "p", spec_of({150}, 219), DType::f32);
      for (int step = 1; step <= 3; ++step) {
        bench.draw_gradient(s, step);
        bench.update(*optimizer, {&s}, step);
      }
      omp_set_num_threads(before);
      if (first.empty()) first = s.values();
      EXPECT_EQ(s.values(), first) << plugin << " with " << threads << " threads";
    }
  }
}

TEST(Rules, RefuseWhatDoesNotFit) {
  for (const std::string plugin : {"adamw", "sgd", "muon"}) {
    Workbench bench;
    const auto optimizer = bench.make(plugin, {});
    const auto refused = [&](auto&& spoil, const std::string& because) {
      Subject s = bench.subject(*optimizer, "culprit", spec_of({4}, 6), DType::f32);
      spoil(s.item);
      try {
        bench.update(*optimizer, {&s}, 1);
        ADD_FAILURE() << plugin << " took it: " << because;
      } catch (const Error& e) {
        EXPECT_EQ(e.fault(), Fault::programming);
        EXPECT_NE(std::string(e.what()).find("culprit"), std::string::npos) << e.what();
      }
    };
    refused([](UpdateItem& i) { i.state.pop_back(); }, "a state tensor is missing");
    refused([&](UpdateItem& i) { i.grad = Tensor::zeros({6, 4}, DType::f32, bench.device()); }, "the gradient has another shape");
    refused([&](UpdateItem& i) { i.grad = i.grad.to(DType::f64); }, "the gradient has another dtype");
    refused([&](UpdateItem& i) { i.value = Tensor::zeros({6, 4}, DType::f32, bench.device()).transposed(0, 1); }, "rows are strided");
    refused([&](UpdateItem& i) { for (Tensor& t : i.state) t = t.to(DType::bf16); }, "state in bf16");
  }
}

TEST(Rules, RefuseOptionsOutOfRange) {
  Workbench bench;
  const std::pair<std::string, Overrides> wrong[] = {
      {"adamw", {{"lr", "0"}}}, {"adamw", {{"beta2", "1"}}}, {"adamw", {{"weight_decay", "-1"}}},
      {"sgd", {{"momentum", "1.5"}}}, {"sgd", {{"momentum", "0"}, {"nesterov", "true"}}},
      {"muon", {{"steps", "0"}}}, {"muon", {{"scale", "large"}}}, {"muon", {{"rest", "adamv"}}}, {"adamw", {{"momentum", "0.9"}}}};
  for (const auto& [plugin, options] : wrong) {
    try {
      bench.make(plugin, options);
      ADD_FAILURE() << plugin << " took " << options.back().first << ": " << options.back().second;
    } catch (const Error& e) {
      EXPECT_EQ(e.fault(), Fault::input) << e.what();
    }
  }
}

}  // namespace
}  // namespace capstan::test
