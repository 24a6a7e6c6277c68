// Norms, softmax, running sums, rows by id and scores against f64 references, over odd shapes, types and misaligned pointers.
#include "harness.h"

#include <kernels/cuda/rows.h>
#include <kernels/cuda/scan.h>

#include <algorithm>
#include <limits>

namespace gpu_test {

namespace cuda = capstan::kernels::cuda;

namespace {

template <class T> using Wide = cuda::Compute<T>;

std::string label(const char* op, const char* type, std::int64_t rows, std::int64_t cols, std::int64_t shift) {
  return std::string(op) + " " + type + " " + std::to_string(rows) + " x " + std::to_string(cols) + (shift != 0 ? " misaligned" : "");
}

template <class T>
void norms(Context& ctx, std::int64_t rows, std::int64_t cols, std::int64_t shift) {
  using C = Wide<T>;
  const double epsilon = 1e-5;
  const auto x0 = random_values<T>(rows * cols, 1, 1.5, 0.3), residual = random_values<T>(rows * cols, 5), g = random_values<T>(rows * cols, 2), g_sum = random_values<T>(rows * cols, 6);
  const auto w = random_values<C>(cols, 3, 0.5, 1), b = random_values<C>(cols, 4);
  const Buffer<T> d_x(x0, shift), d_residual(residual, shift), dg(g, shift), d_g_sum(g_sum, shift);
  const Buffer<C> dw(w), db(b);
  const auto x_and_residual = [&] {
    auto sum = x0;
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = T(static_cast<C>(x0[i]) + static_cast<C>(residual[i]));
    return sum;
  }();
  const std::int64_t blocks = cuda::norm_blocks(ctx, rows, cols);
  for (const int form : {0, 1, 2, 3}) {
    const bool centre = form % 2 != 0, added = form / 2 != 0;
    const auto& x = added ? x_and_residual : x0;
    const auto name = [&](const char* part) { return label((std::string(added ? "add_" : "") + (centre ? "layer_norm" : "rms_norm") + part).c_str(), type_name<T>(), rows, cols, shift); };
    std::vector<double> y(static_cast<std::size_t>(rows * cols)), dx(y.size()), means(static_cast<std::size_t>(rows)), inverses(means.size());
    std::vector<double> sum_w(static_cast<std::size_t>(cols)), sum_b(sum_w.size()), size_w(sum_w.size());
    for (std::int64_t r = 0; r < rows; ++r) {
      double mean = 0, squares = 0, dot = 0, total = 0;
      const std::size_t at = static_cast<std::size_t>(r * cols);
      if (centre) for (std::int64_t c = 0; c < cols; ++c) mean += value(x[at + c]) / static_cast<double>(cols);
      for (std::int64_t c = 0; c < cols; ++c) squares += (value(x[at + c]) - mean) * (value(x[at + c]) - mean);
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(cols) + epsilon);
      means[r] = mean, inverses[r] = inverse;
      for (std::int64_t c = 0; c < cols; ++c) {
        const double unit = (value(x[at + c]) - mean) * inverse, gw = value(g[at + c]) * value(w[c]);
        y[at + c] = unit * value(w[c]) + (centre ? value(b[c]) : 0);
        dot += gw * unit / static_cast<double>(cols), total += centre ? gw / static_cast<double>(cols) : 0;
        sum_w[c] += value(g[at + c]) * unit, size_w[c] += std::abs(value(g[at + c]) * unit), sum_b[c] += value(g[at + c]);
      }
      for (std::int64_t c = 0; c < cols; ++c) {
        const double unit = (value(x[at + c]) - mean) * inverse;
        dx[at + c] = inverse * (value(g[at + c]) * value(w[c]) - unit * dot - total) + (added ? value(g_sum[at + c]) : 0);
      }
    }
    Buffer<T> out(rows * cols, shift), sum(rows * cols, shift), grad(rows * cols, shift);
    Buffer<C> mean(rows), inverse(rows), partial_w(blocks * cols), partial_b(blocks * cols);
    const auto forward = [&] {
      capstan::kernels::NormRows n{.centre = centre, .rows = rows, .cols = cols, .epsilon = epsilon};
      n.x = d_x.data(), n.w = dw.data(), n.b = centre ? db.data() : nullptr, n.y = out.data(), n.mean = mean.data(), n.inverse = inverse.data();
      if (added) n.residual = d_residual.data(), n.sum = sum.data();
      cuda::norm(ctx, num_of<T>(), n);
    };
    const auto backward = [&](T* to) {
      capstan::kernels::NormRowsBackward n{.centre = centre, .rows = rows, .cols = cols};
      n.x = added ? sum.data() : d_x.data(), n.w = dw.data(), n.mean = mean.data(), n.inverse = inverse.data(), n.g = dg.data(), n.g_sum = added ? d_g_sum.data() : nullptr;
      n.dx = to, n.partial_w = partial_w.data(), n.partial_b = centre ? partial_b.data() : nullptr;
      cuda::norm_backward(ctx, num_of<T>(), n);
    };
    forward();
    if (added) same_bits(name(" sum"), x_and_residual, sum.get());
    near_rounded(name(""), out.get(), y, 2e-5);
    near(name(" inverse"), inverse.get(), inverses, num_of<T>() == Num::f64 ? 1e-12 : 2e-6, 0);
    if (centre) near(name(" mean"), mean.get(), means, 1e-6, num_of<T>() == Num::f64 ? 1e-12 : 2e-6);
    backward(grad.data());
    const auto first = grad.get();
    near_rounded(name(" dx"), first, dx, 5e-5);
    const auto total = [&](const Buffer<C>& partial) {
      const auto p = partial.get();
      std::vector<C> all(static_cast<std::size_t>(cols));
      std::vector<double> s(all.size());
      for (std::int64_t k = 0; k < blocks; ++k)
        for (std::int64_t c = 0; c < cols; ++c) s[c] += value(p[static_cast<std::size_t>(k * cols + c)]);
      for (std::size_t c = 0; c < s.size(); ++c) all[c] = static_cast<C>(s[c]);
      return all;
    };
    const double slack = num_of<T>() == Num::f64 ? 1e-11 : 2e-6 * std::sqrt(static_cast<double>(rows)) * 8;
    near(name(" dw"), total(partial_w), sum_w, 1e-5, slack);
    if (centre) near(name(" db"), total(partial_b), sum_b, 1e-5, slack);
    const auto once = partial_w.get();
    report(out.guarded() && sum.guarded() && grad.guarded() && partial_w.guarded() && inverse.guarded(), name(" guards"));
    grad.poison(), partial_w.poison();
    backward(grad.data());
    same_bits(name(" dx twice"), first, grad.get());
    same_bits(name(" dw twice"), once, partial_w.get());
    partial_w.poison();
    backward(nullptr);
    same_bits(name(" dw alone"), once, partial_w.get());
  }
}

template <class T>
void softmaxes(Context& ctx, std::int64_t rows, std::int64_t cols, std::int64_t shift) {
  const auto x = random_values<T>(rows * cols, 5, 3), g = random_values<T>(rows * cols, 6);
  const Buffer<T> in(x, shift), dg(g, shift);
  for (const bool logarithm : {false, true}) {
    const auto name = [&](const char* part) { return label((std::string(logarithm ? "log_softmax" : "softmax") + part).c_str(), type_name<T>(), rows, cols, shift); };
    Buffer<T> out(rows * cols, shift), grad(rows * cols, shift);
    cuda::softmax(ctx, num_of<T>(), rows, cols, in.data(), out.data(), logarithm);
    const auto saved = out.get();
    cuda::softmax_backward(ctx, num_of<T>(), rows, cols, out.data(), dg.data(), grad.data(), logarithm);
    std::vector<double> y(x.size()), dx(x.size());
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::size_t at = static_cast<std::size_t>(r * cols), n = static_cast<std::size_t>(cols);
      double top = -1e300, sum = 0, total = 0;
      for (std::size_t c = 0; c < n; ++c) top = std::max(top, value(x[at + c]));
      for (std::size_t c = 0; c < n; ++c) sum += std::exp(value(x[at + c]) - top);
      for (std::size_t c = 0; c < n; ++c) {
        const double d = value(x[at + c]) - top;
        y[at + c] = logarithm ? d - std::log(sum) : std::exp(d) / sum;
        total += logarithm ? value(g[at + c]) : value(g[at + c]) * value(saved[at + c]);
      }
      for (std::size_t c = 0; c < n; ++c)
        dx[at + c] = logarithm ? value(g[at + c]) - std::exp(value(saved[at + c])) * total : value(saved[at + c]) * (value(g[at + c]) - total);
    }
    near_rounded(name(""), saved, y, logarithm ? 1e-5 : 1e-9);
    near_rounded(name(" dx"), grad.get(), dx, 2e-5);
    report(out.guarded() && grad.guarded(), name(" guards"));
  }
}

template <class T>
void scans(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, std::int64_t shift) {
  const auto x = random_values<T>(outer * n * inner, 7);
  const Buffer<T> in(x, shift);
  for (const bool reverse : {false, true}) {
    const std::string name = label("cumsum", type_name<T>(), outer * inner, n, shift) + " inner " + std::to_string(inner) + (reverse ? " from the end" : "");
    std::vector<double> y(x.size());
    double most = 1;
    for (std::int64_t column = 0; column < outer * inner; ++column) {
      double sum = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(column / inner * n * inner + (reverse ? n - 1 - i : i) * inner + column % inner);
        y[at] = sum += value(x[at]), most = std::max(most, std::abs(sum));
      }
    }
    Buffer<T> out(outer * n * inner, shift);
    cuda::scan_middle(ctx, num_of<T>(), outer, n, inner, in.data(), reverse, out.data());
    const auto first = out.get();
    // Rounding of each sum on the way counts: the largest of them, times how many there are in a row's tree.
    near(name, first, y, num_of<T>() == Num::bf16 ? 1.0 / 256 : 0, (num_of<T>() == Num::f64 ? 1e-15 : 6e-8) * most * std::sqrt(static_cast<double>(n)) * 4);
    report(out.guarded(), name + " guards");
    out.poison();
    cuda::scan_middle(ctx, num_of<T>(), outer, n, inner, in.data(), reverse, out.data());
    same_bits(name + " twice", first, out.get());
  }
}

template <class T, class Out>
void scatters(Context& ctx, std::int64_t count, std::int64_t cols, std::int64_t table_rows, bool skewed, bool overwrite, std::int64_t shift) {
  using C = Wide<T>;
  const std::string name = label("scatter_add_rows", type_name<T>(), count, cols, shift) + " into " + type_name<Out>() + " of " + std::to_string(table_rows) +
                           (skewed ? " skewed" : "") + (overwrite ? " overwrite" : "");
  std::mt19937_64 random(7);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (auto& id : ids) {
    id = static_cast<std::int32_t>(skewed && random() % 3 != 0 ? table_rows / 2 : static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(table_rows)));
    if (random() % 4 == 0) id = -1;  // nobody's
  }
  const auto g = random_values<T>(count * cols, 8);
  const auto before = random_values<Out>(table_rows * cols, 9);
  std::vector<double> ref(before.size());
  if (!overwrite) ref = wide(before);
  std::vector<double> added(before.size());
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t c = 0; c < cols && ids[static_cast<std::size_t>(t)] >= 0; ++c) added[static_cast<std::size_t>(ids[t] * cols + c)] += value(g[static_cast<std::size_t>(t * cols + c)]);
  for (std::size_t i = 0; i < ref.size(); ++i) ref[i] += added[i];
  const Buffer<std::int32_t> d_ids(ids);
  const Buffer<T> d_g(g, shift);
  Buffer<Out> table(before, shift);
  cuda::scatter_add_rows(ctx, num_of<T>(), count, cols, d_ids.data(), d_g.data(), table_rows, num_of<Out>(), table.data(), overwrite);
  const auto first = table.get();
  const double slack = num_of<T>() == Num::f64 ? 1e-11 : 3e-6 * static_cast<double>(skewed ? count : 30);
  near(name, first, ref, num_of<Out>() == Num::bf16 ? 1.0 / 256 : 1e-5, std::is_same_v<C, double> ? 1e-11 : std::min(slack, 2e-3));
  report(table.guarded(), name + " guards");
  table.put(before);
  cuda::scatter_add_rows(ctx, num_of<T>(), count, cols, d_ids.data(), d_g.data(), table_rows, num_of<Out>(), table.data(), overwrite);
  same_bits(name + " twice", first, table.get());
}

void gathers(Context& ctx, std::int64_t count, std::int64_t row_bytes, std::int64_t shift) {
  const std::int64_t rows = 97;
  std::mt19937_64 random(3);
  std::vector<std::uint8_t> table(static_cast<std::size_t>(rows * row_bytes));
  for (auto& b : table) b = static_cast<std::uint8_t>(random());
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (auto& id : ids) id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(rows + rows / 4)) - static_cast<std::int32_t>(rows / 4);
  std::vector<std::uint8_t> expected(static_cast<std::size_t>(count * row_bytes));  // zero where the id is nobody's
  for (std::int64_t t = 0; t < count; ++t)
    if (ids[static_cast<std::size_t>(t)] >= 0) std::memcpy(expected.data() + t * row_bytes, table.data() + ids[t] * row_bytes, static_cast<std::size_t>(row_bytes));
  const Buffer<std::uint8_t> d_table(table, shift);
  const Buffer<std::int32_t> d_ids(ids);
  Buffer<std::uint8_t> out(count * row_bytes, shift);
  cuda::gather_rows(ctx, count, row_bytes, d_table.data(), rows, d_ids.data(), out.data());
  same_bits("gather_rows " + std::to_string(count) + " x " + std::to_string(row_bytes) + " bytes", expected, out.get());
  report(out.guarded(), "gather_rows guards");
}

template <class A>
void scores(Context& ctx, std::int64_t rows, std::int64_t cols, std::int64_t stride, bool weighted, bool small, double spread) {
  const std::string name = label("score_rows", type_name<A>(), rows, cols, 0) + " stride " + std::to_string(stride) + (weighted ? " gradient" : "") + (small ? " bf16" : "");
  auto logits = random_values<A>(rows * stride, 11, spread);
  if (cols > 3) logits[2] = -std::numeric_limits<A>::infinity();
  const auto weights = random_values<float>(rows, 12, 0.1, 0.5);
  std::mt19937_64 random(4);
  std::vector<std::int32_t> targets(static_cast<std::size_t>(rows));
  for (auto& t : targets) t = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(cols));
  if (rows > 2) targets[1] = -1;
  if (rows > 3) targets[3] = static_cast<std::int32_t>(cols - 1);
  if (cols > 3 && targets[0] == 2) targets[0] = 3;
  std::vector<double> lse(static_cast<std::size_t>(rows)), lp(lse.size()), h(lse.size()), grad(static_cast<std::size_t>(rows * cols)), later(grad.size());
  const auto gl = random_values<A>(rows, 21), gs = random_values<A>(rows, 22), ge = random_values<A>(rows, 23);
  for (std::int64_t r = 0; r < rows; ++r) {
    const A* x = logits.data() + r * stride;
    double top = -1e300, sum = 0, dot = 0;
    for (std::int64_t c = 0; c < cols; ++c) top = std::max(top, value(x[c]));
    for (std::int64_t c = 0; c < cols; ++c) {
      const double d = value(x[c]) - top, e = std::exp(d);
      sum += e, dot += e > 0 ? e * d : 0;
    }
    lse[r] = top + std::log(sum), h[r] = std::log(sum) - dot / sum, lp[r] = targets[r] >= 0 ? value(x[targets[r]]) - lse[r] : 0;
    for (std::int64_t c = 0; c < cols; ++c) {
      const double log_p = value(x[c]) - lse[r], p = std::exp(log_p), one = c == targets[r] ? 1 : 0;
      grad[r * cols + c] = targets[r] >= 0 ? value(weights[r]) * (p - one) : 0;
      later[r * cols + c] = (targets[r] >= 0 ? value(gl[r]) * (one - p) : 0) + value(gs[r]) * p - (p > 0 ? value(ge[r]) * p * (log_p + h[r]) : 0);
    }
  }
  Buffer<A> d_logits(logits);
  const Buffer<float> d_weights(weights);
  const Buffer<std::int32_t> d_targets(targets);
  Buffer<A> d_lp(rows), d_lse(rows), d_h(rows);
  Buffer<bf16> d_small(rows * stride);
  capstan::kernels::ScoreRows s;
  s.compute = num_of<A>(), s.rows = rows, s.cols = cols, s.stride = stride, s.logits = d_logits.data(), s.targets = d_targets.data();
  s.logprob = d_lp.data(), s.logsumexp = d_lse.data(), s.entropy = d_h.data();
  if (weighted) s.weights = d_weights.data();
  if (small) s.narrow = d_small.data();
  cuda::score_rows(ctx, s);
  const bool exact = num_of<A>() == Num::f64;
  const double tight = exact ? 1e-11 : 4e-6;
  near(name + " logprob", d_lp.get(), lp, tight, tight * 4);
  near(name + " logsumexp", d_lse.get(), lse, tight, tight);
  near(name + " entropy", d_h.get(), h, tight * 4, tight * 8);
  const auto packed = [&](const auto& v) {
    auto out = v;
    out.resize(static_cast<std::size_t>(rows * cols));
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < cols; ++c) out[static_cast<std::size_t>(r * cols + c)] = v[static_cast<std::size_t>(r * stride + c)];
    return out;
  };
  const auto compare = [&](const char* part, const std::vector<double>& ref) {
    if (small) near(name + part, packed(d_small.get()), ref, 1.0 / 256, 1e-7);
    // A logit of size 4 spread is itself known to 2^-24 of that, and its exponential no better.
    else near(name + part, packed(d_logits.get()), ref, exact ? 1e-11 : 1e-5 + 2e-6 * spread, exact ? 1e-13 : 1e-7);
  };
  if (weighted) compare(" dlogits", grad);
  else if (!small) same_bits(name + " logits untouched", logits, d_logits.get());
  report(d_logits.guarded() && d_small.guarded() && d_lp.guarded(), name + " guards");
  d_logits.put(logits);
  const Buffer<A> d_gl(gl), d_gs(gs), d_ge(ge);
  s.weights = nullptr, s.g_logprob = d_gl.data(), s.g_logsumexp = d_gs.data(), s.g_entropy = d_ge.data();
  cuda::score_rows_backward(ctx, s);
  compare(" later gradient", later);
  if (weighted) {
    Buffer<A> objective(1);
    double sum = 0;
    for (std::int64_t r = 0; r < rows; ++r) sum -= value(weights[r]) * lp[r];
    cuda::weighted_sum(ctx, num_of<A>(), rows, d_weights.data(), d_lp.data(), objective.data());
    near(name + " objective", objective.get(), {sum}, 1e-5, 1e-5);
  }
}

}  // namespace

void test_rows(Context& ctx, bool small) {
  const std::vector<std::int64_t> columns = small ? std::vector<std::int64_t>{1, 7, 8, 100, 128, 768, 2056, 9000}
                                                  : std::vector<std::int64_t>{1, 7, 8, 64, 100, 128, 768, 1000, 1024, 1032, 1600, 2048, 4096, 5001, 5120, 8192, 12288, 16384, 20000, 40000};
  for (const std::int64_t cols : columns) {
    const std::int64_t rows = small ? (cols > 1000 ? 4 : 19) : cols > 5000 ? 37 : 301;
    for (const std::int64_t shift : {0, 1}) {
      if (small && shift == 1 && cols > 128) continue;
      norms<float>(ctx, rows, cols, shift), norms<bf16>(ctx, rows, cols, shift);
      softmaxes<float>(ctx, rows, cols, shift), softmaxes<bf16>(ctx, rows, cols, shift);
      if (cols <= (small ? 100 : 4096)) norms<double>(ctx, std::min<std::int64_t>(rows, 50), cols, shift), softmaxes<double>(ctx, std::min<std::int64_t>(rows, 50), cols, shift);
    }
  }
  norms<bf16>(ctx, 1, 768, 0);
  if (!small) norms<bf16>(ctx, 4099, 768, 0), norms<float>(ctx, 5000, 96, 0), norms<bf16>(ctx, 3000, 8192, 0);
  struct Middle { std::int64_t outer, n, inner; };
  for (const Middle m : {Middle{1, 1, 1}, {3, 64, 1}, {3, 65, 1}, {2, 1024, 1}, {2, 1025, 1}, {1, 5000, 1}, {300, 5, 1}, {2, 1500, 3}, {5, 7, 33}, {2, 70, 9000}}) {
    if (small && m.inner > 1000) continue;
    scans<float>(ctx, m.outer, m.n, m.inner, 0), scans<bf16>(ctx, m.outer, m.n, m.inner, 1), scans<double>(ctx, m.outer, m.n, m.inner, 0);
  }
  for (const bool skewed : {false, true})
    for (const bool overwrite : {false, true})
      for (const std::int64_t shift : {0, 1}) {
        if (!small) scatters<bf16, float>(ctx, 5000, 768, 1000, skewed, overwrite, shift);
        scatters<bf16, float>(ctx, 500, 48, 20, skewed, overwrite, shift);
        scatters<bf16, bf16>(ctx, 777, small ? 12 : 100, 50, skewed, overwrite, shift);
        scatters<float, float>(ctx, 64, 96, 7, skewed, overwrite, shift);
        scatters<float, bf16>(ctx, 129, 33, 300, skewed, overwrite, shift);
        scatters<double, double>(ctx, small ? 200 : 1000, 40, 90, skewed, overwrite, shift);
        scatters<float, float>(ctx, 1, 8, 1, skewed, overwrite, shift);
        scatters<float, float>(ctx, 300, 8, 64, skewed, overwrite, shift);
      }
  for (const std::int64_t bytes : {1, 2, 6, 12, 16, 48, 1536, 4098})
    for (const std::int64_t shift : {0, 4}) gathers(ctx, small ? 21 : 301, bytes, bytes % 4 == 0 ? shift : 0);
}

void test_scores(Context& ctx, bool small) {
  // Emulated, a gradient's row has one block: no more columns than that.
  for (const std::int64_t cols : small ? std::vector<std::int64_t>{1, 5, 64, 1000, 6001} : std::vector<std::int64_t>{1, 5, 64, 1000, 20000, 50257, 151936, 260000, 500000}) {
    const std::int64_t rows = small ? 5 : cols > 10000 ? 9 : 70, padded = (cols + 7) / 8 * 8;
    for (const bool weighted : {false, true}) {
      scores<float>(ctx, rows, cols, padded, weighted, false, 3);
      scores<float>(ctx, rows, cols, padded, weighted, true, 3);
      scores<float>(ctx, rows, cols, cols, weighted, false, 30);
      if (cols <= 60000) scores<double>(ctx, rows, cols, padded, weighted, false, 3);
    }
  }
}

}  // namespace gpu_test
