// Attention against f64 references by FlashAttention's rule: the error may be at most twice that of a plain bf16
// implementation (which rounds scores, probabilities and sums to bf16). Odd shapes, ragged sequences, column slices of a
// fused tensor, pages; rows' bits must not depend on the batch, nor on the run.
#include "harness.h"

#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#endif

#include <algorithm>
#include <limits>

namespace gpu_test {

namespace cuda = capstan::kernels::cuda;
using capstan::kernels::Attention;
using capstan::kernels::PagedAttention;

namespace {

struct Shape {
  std::vector<std::int32_t> starts;
  std::int64_t heads, kv_heads, head_size, dead = 0;
  bool fused = true, odd = false;  ///< odd: strides and addresses off 16 bytes
  std::int64_t window = 0;
  std::int64_t rows() const { return starts.back() + dead; }
  std::string name() const {
    std::string s = std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " + std::to_string(head_size) + ", sequences";
    for (std::size_t i = 0; i + 1 < starts.size(); ++i) s.append(" ").append(std::to_string(starts[i + 1] - starts[i]));
    return s + (dead > 0 ? " + dead rows" : "") + (fused ? " fused" : "") + (odd ? " misaligned" : "") + (window > 0 ? " window " + std::to_string(window) : "");
  }
};

struct Numbers { std::vector<double> out, lse, dq, dk, dv; };

/// In f64; with `plain`, scores, probabilities, their gradients and results are rounded to bf16.
Numbers reference(const Shape& s, const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v, const std::vector<double>& g, double scale,
                  bool plain) {
  const auto round = [&](double x) { return plain ? rounded(x) : x; };
  const std::int64_t d = s.head_size, hq = s.heads * d, hk = s.kv_heads * d, rows = s.rows(), group = s.heads / s.kv_heads;
  Numbers n;
  n.out.assign(static_cast<std::size_t>(rows * hq), 0), n.dq = n.out, n.dk.assign(static_cast<std::size_t>(rows * hk), 0), n.dv = n.dk;
  n.lse.assign(static_cast<std::size_t>(s.heads * rows), 0);
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t kv = 0; kv < s.kv_heads; ++kv)
    for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (std::size_t q_seq = 0; q_seq + 1 < s.starts.size(); ++q_seq)
        for (std::int64_t i = s.starts[q_seq]; i < s.starts[q_seq + 1]; ++i) {
          const std::int64_t begin = std::max<std::int64_t>(s.starts[q_seq], s.window > 0 ? i - s.window + 1 : 0), count = i - begin + 1;
          std::vector<double> p(static_cast<std::size_t>(count)), dp(p.size());
          double top = -1e300, sum = 0, delta = 0;
          for (std::int64_t j = 0; j < count; ++j) {
            double x = 0;
            for (std::int64_t c = 0; c < d; ++c) x += q[i * hq + h * d + c] * k[(begin + j) * hk + kv * d + c];
            p[j] = round(x * scale), top = std::max(top, p[j]);
          }
          for (double& x : p) x = std::exp(x - top), sum += x;
          n.lse[h * rows + i] = top + std::log(sum);
          for (double& x : p) x = round(x / sum);
          for (std::int64_t c = 0; c < d; ++c) {
            double x = 0;
            for (std::int64_t j = 0; j < count; ++j) x += p[j] * v[(begin + j) * hk + kv * d + c];
            n.out[i * hq + h * d + c] = round(x);
          }
          for (std::int64_t j = 0; j < count; ++j) {
            double x = 0;
            for (std::int64_t c = 0; c < d; ++c) x += g[i * hq + h * d + c] * v[(begin + j) * hk + kv * d + c];
            dp[j] = round(x), delta += dp[j] * p[j];
          }
          for (std::int64_t j = 0; j < count; ++j) {
            const double ds = round(p[j] * (dp[j] - delta)) * scale;
            for (std::int64_t c = 0; c < d; ++c) {
              n.dq[i * hq + h * d + c] += ds * k[(begin + j) * hk + kv * d + c];
              n.dk[(begin + j) * hk + kv * d + c] += ds * q[i * hq + h * d + c];
              n.dv[(begin + j) * hk + kv * d + c] += p[j] * g[i * hq + h * d + c];
            }
          }
        }
  if (plain)
    for (auto* m : {&n.dq, &n.dk, &n.dv})
      for (double& x : *m) x = rounded(x);
  return n;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double w = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double e = std::abs(a[i] - b[i]);
    if (!(e <= w)) w = std::isfinite(e) ? e : 1e300;
  }
  return w;
}

template <class T>
std::vector<T> to_type(const std::vector<double>& v) {
  std::vector<T> t(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) t[i] = static_cast<T>(static_cast<float>(v[i]));
  return t;
}

/// Columns [from, from + width) of rows `stride` apart.
std::vector<double> columns(const std::vector<double>& all, std::int64_t rows, std::int64_t stride, std::int64_t from, std::int64_t width) {
  std::vector<double> v(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < width; ++c) v[static_cast<std::size_t>(r * width + c)] = all[static_cast<std::size_t>(r * stride + from + c)];
  return v;
}

/// One problem on the GPU. q, k and v are slices of rows of `stride`; so are dq, dk and dv.
template <class T>
struct Problem {
  Shape s;
  std::int64_t hq, hk, stride, rows;
  std::vector<T> host_qkv, host_g;
  Buffer<T> qkv, g, out, grads;
  Buffer<cuda::Compute<T>> lse;
  Buffer<std::int32_t> starts;
  Attention a;

  Problem(const Shape& shape, double scale, std::uint64_t seed)
      : s(shape), hq(s.heads * s.head_size), hk(s.kv_heads * s.head_size), stride(hq + 2 * hk + (s.odd ? 3 : 0)), rows(s.rows()),
        host_qkv(random_values<T>(rows * stride, seed)), host_g(random_values<T>(rows * hq, seed + 1)), qkv(host_qkv, s.odd ? 1 : 0), g(host_g, s.odd ? 1 : 0),
        out(rows * hq, s.odd ? 1 : 0), grads(rows * stride, s.odd ? 1 : 0), lse(s.heads * rows), starts(s.starts) {
    a.num = num_of<T>();
    a.q = qkv.data(), a.k = qkv.data() + hq, a.v = qkv.data() + hq + hk, a.out = out.data();
    a.q_stride = a.k_stride = a.v_stride = stride, a.out_stride = hq;
    a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_size = s.head_size, a.window = s.window, a.scale = scale;
    a.host_starts = s.starts.data(), a.starts = starts.data(), a.sequences = static_cast<std::int64_t>(s.starts.size()) - 1, a.rows = rows;
    for (std::size_t i = 0; i + 1 < s.starts.size(); ++i) a.longest = std::max<std::int64_t>(a.longest, s.starts[i + 1] - s.starts[i]);
    a.lse = lse.data(), a.dout = g.data(), a.dout_stride = hq;
    a.dq = grads.data(), a.dk = grads.data() + hq, a.dv = grads.data() + hq + hk, a.dq_stride = stride, a.dkv_stride = stride;
  }
};

/// What runs a problem: the path that is tested.
struct Path {
  const char* name = "";
  std::function<bool(const Attention&)> forward, backward;
  bool same_bits = true;
};

template <class T>
void one_by(const Shape& s, const Path& path) {
  const double scale = 1 / std::sqrt(static_cast<double>(s.head_size));
  const std::string name = std::string("attention ") + path.name + " " + type_name<T>() + " " + s.name();
  Problem<T> p(s, scale, 31);
  const auto all = wide(p.host_qkv);
  const auto q = columns(all, p.rows, p.stride, 0, p.hq), k = columns(all, p.rows, p.stride, p.hq, p.hk), v = columns(all, p.rows, p.stride, p.hq + p.hk, p.hk);
  const auto g = wide(p.host_g);
  const Numbers exact = reference(s, q, k, v, g, scale, false);
  const Numbers plain = num_of<T>() == Num::bf16 ? reference(s, q, k, v, g, scale, true) : exact;
  if (!path.forward(p.a)) return report(false, name + " forward did not run");
  const auto out = wide(p.out.get());
  if (!path.backward(p.a)) return report(false, name + " backward did not run");
  const auto grads = wide(p.grads.get());
  const auto lse = wide(p.lse.get());
  const auto dq = columns(grads, p.rows, p.stride, 0, p.hq), dk = columns(grads, p.rows, p.stride, p.hq, p.hk), dv = columns(grads, p.rows, p.stride, p.hq + p.hk, p.hk);
  const auto rule = [&](const char* part, const std::vector<double>& got, const std::vector<double>& ref, const std::vector<double>& rough) {
    double size = 0;
    for (const double x : ref) size = std::max(size, std::abs(x));
    // Gradients that are 0 (a window of one key) keep what the rounding of sums near 1 leaves.
    const double floor = size > 0 ? size * (num_of<T>() == Num::f64 ? 1e-12 : num_of<T>() == Num::f32 ? 2e-5 : 1e-3) : num_of<T>() == Num::f64 ? 1e-14 : 1e-6, error = worst(got, ref), allowed = 2 * worst(rough, ref) + floor;
    char detail[120];
    std::snprintf(detail, sizeof detail, "error %.3g, allowed %.3g, largest %.3g", error, allowed, size);
    report(error <= allowed, name + part, detail);
  };
  rule(" out", out, exact.out, plain.out);
  rule(" dq", dq, exact.dq, plain.dq), rule(" dk", dk, exact.dk, plain.dk), rule(" dv", dv, exact.dv, plain.dv);
  double lse_error = 0;
  for (std::int64_t h = 0; h < s.heads; ++h)
    for (std::int64_t t = 0; t < s.starts.back(); ++t) {
      const double e = std::abs(lse[static_cast<std::size_t>(h * p.rows + t)] - exact.lse[static_cast<std::size_t>(h * p.rows + t)]);
      if (!(e <= lse_error)) lse_error = std::isfinite(e) ? e : 1e300;
    }
  report(lse_error <= (num_of<T>() == Num::f64 ? 1e-12 : 1e-4), name + " log-sum-exp", "error " + std::to_string(lse_error));
  bool dead_zero = true;
  for (std::int64_t r = s.starts.back(); r < p.rows; ++r) {
    for (std::int64_t c = 0; c < p.hq; ++c) dead_zero = dead_zero && out[static_cast<std::size_t>(r * p.hq + c)] == 0 && dq[static_cast<std::size_t>(r * p.hq + c)] == 0;
    for (std::int64_t c = 0; c < p.hk; ++c) dead_zero = dead_zero && dk[static_cast<std::size_t>(r * p.hk + c)] == 0 && dv[static_cast<std::size_t>(r * p.hk + c)] == 0;
  }
  report(dead_zero, name + " dead rows");
  bool gaps = true;  // columns between the slices' rows are nobody's
  const auto raw = p.grads.get();
  for (std::int64_t r = 0; r < p.rows; ++r)
    for (std::int64_t c = p.hq + 2 * p.hk; c < p.stride; ++c) gaps = gaps && std::isnan(value(raw[static_cast<std::size_t>(r * p.stride + c)]));
  report(gaps && p.out.guarded() && p.grads.guarded() && p.lse.guarded(), name + " guards");
  const auto out_bits = p.out.get();
  p.out.poison(), p.grads.poison();
  path.forward(p.a);
  same_bits(name + " out twice", out_bits, p.out.get());
  path.backward(p.a);
  if (path.same_bits) same_bits(name + " gradients twice", raw, p.grads.get());
}

template <class T>
void one(Context& ctx, const Shape& s, const char*) {
  const auto choice = ctx.attention_choice;
  ctx.attention_choice.cudnn = false;
  one_by<T>(s, Path{"own", [&](const Attention& a) { return cuda::attention(ctx, a), true; }, [&](const Attention& a) { return cuda::attention_backward(ctx, a), true; }});
  ctx.attention_choice = choice;
}

/// A sequence's rows have the same bits alone, in a batch, without its end, and decoded from pages token by token.
template <class T>
void rows_alone(Context& ctx, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_size, std::int64_t window = 0) {
  const std::string name = std::string("attention ") + type_name<T>() + " " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " + std::to_string(head_size) +
                           (window > 0 ? " window " + std::to_string(window) : "");
  const std::vector<std::int32_t> starts{0, 70, 71, 271};
  Shape s{starts, heads, kv_heads, head_size, 0, true, false, window};
  Problem<T> p(s, 0.1, 77);
  cuda::attention(ctx, p.a);
  const auto together = p.out.get();
  const auto rows_of = [&](const std::vector<T>& v, std::int64_t from, std::int64_t count) {
    return std::vector<T>(v.begin() + from * p.hq, v.begin() + (from + count) * p.hq);
  };
  for (const std::int64_t count : {200, 131}) {  // the last sequence, whole and cut
    std::vector<std::int32_t> alone{0, static_cast<std::int32_t>(count)};
    const Buffer<std::int32_t> d_alone(alone);
    Buffer<T> out(count * p.hq);
    Attention a = p.a;
    a.q = static_cast<const T*>(p.a.q) + 71 * p.stride, a.k = static_cast<const T*>(p.a.k) + 71 * p.stride, a.v = static_cast<const T*>(p.a.v) + 71 * p.stride;
    a.out = out.data(), a.lse = nullptr, a.host_starts = alone.data(), a.starts = d_alone.data(), a.sequences = 1, a.rows = count, a.longest = count;
    cuda::attention(ctx, a);
    same_bits(name + " a sequence alone, " + std::to_string(count) + " rows", rows_of(together, 71, count), out.get());
  }
  // Pages in a shuffled order; each sequence's last `fresh` tokens are asked for.
  const std::int64_t page = 64;
  std::vector<std::int32_t> blocks, lengths;
  std::int64_t most = 0, pages = 0;
  for (std::size_t i = 0; i + 1 < starts.size(); ++i) most = std::max<std::int64_t>(most, (starts[i + 1] - starts[i] + page - 1) / page);
  for (std::size_t i = 0; i + 1 < starts.size(); ++i) {
    lengths.push_back(starts[i + 1] - starts[i]);
    for (std::int64_t b = 0; b < most; ++b) blocks.push_back(b * page < lengths.back() ? static_cast<std::int32_t>(pages++) : -1);
  }
  for (auto& b : blocks)
    if (b >= 0) b = static_cast<std::int32_t>((b * 5 + 2) % 7 < pages && pages == 7 ? (b * 5 + 2) % 7 : b);
  const std::int64_t page_size = kv_heads * page * head_size;
  std::vector<T> k_pages(static_cast<std::size_t>(pages * page_size)), v_pages(k_pages.size());
  for (std::size_t i = 0; i + 1 < starts.size(); ++i)
    for (std::int64_t t = 0; t < lengths[i]; ++t)
      for (std::int64_t h = 0; h < kv_heads; ++h)
        for (std::int64_t c = 0; c < head_size; ++c) {
          const std::int64_t to = blocks[i * static_cast<std::size_t>(most) + static_cast<std::size_t>(t / page)] * page_size + (h * page + t % page) * head_size + c;
          const std::int64_t from = (starts[i] + t) * p.stride + p.hq + h * head_size + c;
          k_pages[static_cast<std::size_t>(to)] = p.host_qkv[static_cast<std::size_t>(from)], v_pages[static_cast<std::size_t>(to)] = p.host_qkv[static_cast<std::size_t>(from + p.hk)];
        }
  const Buffer<T> d_k(k_pages), d_v(v_pages);
  const Buffer<std::int32_t> d_blocks(blocks), d_lengths(lengths);
  for (const std::int32_t fresh : {1, 40}) {
    std::vector<std::int32_t> fresh_starts{0};
    std::vector<T> q, expected;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const std::int32_t n = std::min(fresh, lengths[i]);
      fresh_starts.push_back(fresh_starts.back() + n);
      for (std::int64_t t = starts[i + 1] - n; t < starts[i + 1]; ++t) {
        q.insert(q.end(), p.host_qkv.begin() + t * p.stride, p.host_qkv.begin() + t * p.stride + p.hq);
        expected.insert(expected.end(), together.begin() + t * p.hq, together.begin() + (t + 1) * p.hq);
      }
    }
    const Buffer<T> d_q(q);
    const Buffer<std::int32_t> d_starts(fresh_starts);
    Buffer<T> out(static_cast<std::int64_t>(q.size()));
    PagedAttention a;
    a.num = num_of<T>(), a.q = d_q.data(), a.out = out.data(), a.q_stride = a.out_stride = p.hq, a.page = page, a.k_pages = d_k.data(), a.v_pages = d_v.data();
    a.blocks = d_blocks.data(), a.lengths = d_lengths.data(), a.host_starts = fresh_starts.data(), a.starts = d_starts.data(), a.blocks_stride = most;
    a.sequences = static_cast<std::int64_t>(lengths.size()), a.rows = fresh_starts.back(), a.heads = heads, a.kv_heads = kv_heads, a.head_size = head_size, a.window = window, a.scale = 0.1;
    cuda::attention_paged(ctx, a);
    same_bits(name + " from pages, last " + std::to_string(fresh), expected, out.get());
    report(out.guarded(), name + " from pages guards");
  }
}

/// Rows whose keys are other rows, as context ranks have them: of each sequence two runs of rows that share its keys.
template <class T>
void stretches(Context& ctx, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_size, std::int64_t window) {
  const std::string name = std::string("attention over other rows' keys ") + type_name<T>() + " " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
                           std::to_string(head_size) + (window > 0 ? " window " + std::to_string(window) : "");
  const Shape s{{0, 150, 221}, heads, kv_heads, head_size, 0, true, false, window};
  const double scale = 1 / std::sqrt(static_cast<double>(head_size));
  Problem<T> p(s, scale, 41);
  // First row in the whole, rows; the run with the fewest keys first.
  const std::vector<std::pair<std::int32_t, std::int32_t>> runs{{37, 38}, {112, 38}, {150, 17}, {203, 18}};
  std::vector<std::int32_t> starts{0}, begins, counts;
  std::vector<T> mine_q, mine_g;
  std::vector<double> g(static_cast<std::size_t>(p.rows * p.hq), 0);
  for (const auto& [row, count] : runs) {
    const std::int32_t begin = row < 150 ? 0 : 150;
    starts.push_back(starts.back() + count), begins.push_back(begin), counts.push_back(row + count - begin);
    for (std::int64_t t = row; t < row + count; ++t) {
      mine_q.insert(mine_q.end(), p.host_qkv.begin() + t * p.stride, p.host_qkv.begin() + t * p.stride + p.hq);
      mine_g.insert(mine_g.end(), p.host_g.begin() + t * p.hq, p.host_g.begin() + (t + 1) * p.hq);
      for (std::int64_t c = 0; c < p.hq; ++c) g[static_cast<std::size_t>(t * p.hq + c)] = value(p.host_g[static_cast<std::size_t>(t * p.hq + c)]);
    }
  }
  const std::int64_t used = starts.back(), rows = used + 3;
  mine_q.resize(static_cast<std::size_t>(rows * p.hq)), mine_g.resize(mine_q.size());
  const Buffer<T> q(mine_q), dout(mine_g);
  const Buffer<std::int32_t> device_starts(starts);
  Buffer<T> out(rows * p.hq), dq(rows * p.hq);
  Buffer<cuda::Compute<T>> lse(heads * rows);
  Buffer<T> dkv(std::vector<T>(static_cast<std::size_t>(p.rows * 2 * p.hk)));  // added to
  Attention a = p.a;
  a.q = q.data(), a.q_stride = p.hq, a.out = out.data(), a.lse = lse.data(), a.rows = rows, a.dout = dout.data(), a.dout_stride = p.hq;
  a.host_starts = starts.data(), a.starts = device_starts.data(), a.sequences = static_cast<std::int64_t>(runs.size()), a.longest = 38;
  a.host_key_begins = begins.data(), a.host_key_counts = counts.data();
  a.dq = dq.data(), a.dq_stride = p.hq, a.dk = dkv.data(), a.dv = dkv.data() + p.hk, a.dkv_stride = 2 * p.hk;
  cuda::attention(ctx, a);
  cuda::attention_backward(ctx, a);

  const auto all = wide(p.host_qkv);
  const auto whole_q = columns(all, p.rows, p.stride, 0, p.hq), k = columns(all, p.rows, p.stride, p.hq, p.hk), v = columns(all, p.rows, p.stride, p.hq + p.hk, p.hk);
  const Numbers exact = reference(s, whole_q, k, v, g, scale, false);
  const Numbers plain = num_of<T>() == Num::bf16 ? reference(s, whole_q, k, v, g, scale, true) : exact;
  const auto mine = [&](const std::vector<double>& whole) {
    std::vector<double> picked;
    for (const auto& [row, count] : runs) picked.insert(picked.end(), whole.begin() + row * p.hq, whole.begin() + (row + count) * p.hq);
    picked.resize(static_cast<std::size_t>(rows * p.hq));  // dead rows are 0
    return picked;
  };
  const auto rule = [&](const char* part, const std::vector<double>& got, const std::vector<double>& ref, const std::vector<double>& rough) {
    double size = 0;
    for (const double x : ref) size = std::max(size, std::abs(x));
    const double floor = size * (num_of<T>() == Num::f64 ? 1e-12 : num_of<T>() == Num::f32 ? 2e-5 : 1e-3), error = worst(got, ref), allowed = 2 * worst(rough, ref) + floor;
    report(error <= allowed, name + part, "error " + std::to_string(error) + ", allowed " + std::to_string(allowed));
  };
  const auto grads = wide(dkv.get());
  rule(" out", wide(out.get()), mine(exact.out), mine(plain.out));
  rule(" dq", wide(dq.get()), mine(exact.dq), mine(plain.dq));
  rule(" dk", columns(grads, p.rows, 2 * p.hk, 0, p.hk), exact.dk, plain.dk);
  rule(" dv", columns(grads, p.rows, 2 * p.hk, p.hk, p.hk), exact.dv, plain.dv);
  report(out.guarded() && dq.guarded() && dkv.guarded() && lse.guarded(), name + " guards");
}

std::vector<std::int32_t> equal(std::int64_t count, std::int64_t length) {
  std::vector<std::int32_t> s{0};
  for (std::int64_t i = 0; i < count; ++i) s.push_back(static_cast<std::int32_t>(s.back() + length));
  return s;
}

}  // namespace

void test_attention(Context& ctx, bool small) {
  if (small) {
    for (const std::int64_t d : {16, 48, 64}) one<bf16>(ctx, Shape{{0, 1, 64, 129, 130}, 2, 1, d, 3}, "");
    one<bf16>(ctx, Shape{{0, 70}, 1, 1, 128}, ""), one<bf16>(ctx, Shape{{0, 40}, 2, 1, 200}, "");
    one<bf16>(ctx, Shape{{0, 70}, 2, 1, 33, 0, true, true}, "");
    one<float>(ctx, Shape{{0, 1, 64, 75}, 2, 1, 20, 3, true, true}, ""), one<double>(ctx, Shape{{0, 1, 40}, 2, 1, 24, 3}, "");
    rows_alone<bf16>(ctx, 2, 1, 32);
    for (const std::int64_t window : {0, 50}) stretches<bf16>(ctx, 2, 1, 48, window), stretches<float>(ctx, 2, 1, 20, window), stretches<double>(ctx, 1, 1, 24, window);
    for (const std::int64_t window : {1, 20, 64, 65}) one<bf16>(ctx, Shape{{0, 1, 150}, 2, 1, 48, 2, true, false, window}, "");
    one<float>(ctx, Shape{{0, 1, 75}, 2, 1, 20, 3, true, true, 33}, ""), one<double>(ctx, Shape{{0, 60}, 2, 1, 24, 3, true, false, 16}, "");
    rows_alone<bf16>(ctx, 4, 2, 32, 30), rows_alone<bf16>(ctx, 2, 1, 32, 100), rows_alone<float>(ctx, 2, 1, 16, 40);
    return;
  }
  for (const std::int64_t d : {16, 32, 48, 64, 80, 96, 128, 192, 256})
    for (const std::int64_t kv : {4, 2}) {
      const Shape ragged{{0, 1, 64, 129, 130, 330}, 4, kv, d, 7, true, false};
      one<bf16>(ctx, ragged, "");
      if (d % 64 == 0 || d == 48) one<float>(ctx, ragged, ""), one<double>(ctx, ragged, "");
    }
  one<bf16>(ctx, Shape{{0, 100, 163}, 3, 1, 40, 1, true, true}, "");
  one<bf16>(ctx, Shape{{0, 65}, 2, 2, 36, 0, true, true}, "");
  one<bf16>(ctx, Shape{{0, 70}, 2, 1, 33, 0, true, true}, "");
  one<float>(ctx, Shape{{0, 90}, 2, 1, 20, 3, true, true}, "");
  one<bf16>(ctx, Shape{{0, 0, 5, 5, 9}, 2, 1, 64, 3, true, false}, "");
  one<bf16>(ctx, Shape{equal(3, 256), 6, 2, 64, 0, true, false}, "");
  one<bf16>(ctx, Shape{equal(2, 512), 8, 2, 128, 0, true, false}, "");
  one<bf16>(ctx, Shape{equal(1, 1024), 2, 1, 128, 0, true, false}, "");
  {
    std::vector<std::int32_t> many{0};
    for (int i = 0; i < 100; ++i) many.push_back(many.back() + i % 7);
    one<bf16>(ctx, Shape{many, 2, 1, 64, 5, true, false}, "");
  }
  for (const std::int64_t window : {1, 63, 64, 65, 100, 200, 1000}) {
    for (const std::int64_t d : {32, 64, 96, 128, 192, 256}) one<bf16>(ctx, Shape{{0, 1, 64, 129, 130, 460}, 4, 2, d, 7, true, false, window}, "");
    one<float>(ctx, Shape{{0, 1, 64, 129, 130, 330}, 4, 2, 48, 7, true, false, window}, "");
    one<double>(ctx, Shape{{0, 1, 64, 129, 130, 330}, 4, 2, 64, 0, true, false, window}, "");
  }
#if defined(CAPSTAN_CUDNN)
  try {
    cuda::CudnnAttention cudnn(ctx);
    std::printf("cuDNN %lld\n", static_cast<long long>(cudnn.version()));
    for (const bool ordered : {false, true})
      for (const Shape& s : {Shape{equal(3, 256), 6, 2, 64}, Shape{equal(2, 512), 8, 2, 128}, Shape{equal(2, 512), 4, 4, 128}, Shape{equal(2, 200), 4, 4, 64}, Shape{equal(1, 333), 4, 1, 256},
                             Shape{equal(2, 130), 4, 2, 80, 6}, Shape{{0, 1, 64, 129, 130, 330}, 4, 4, 64}, Shape{{0, 1, 64, 129, 130, 330}, 4, 2, 128, 7}, Shape{{0, 700, 1000}, 8, 2, 64},
                             Shape{equal(2, 512), 8, 2, 128, 0, true, false, 128}, Shape{equal(3, 200), 4, 4, 64, 0, true, false, 1}, Shape{equal(2, 333), 4, 1, 64, 0, true, false, 100},
                             Shape{{0, 1, 64, 129, 130, 330}, 4, 2, 128, 7, true, false, 65}}) {
        bool ragged = false;
        for (std::size_t i = 1; i + 1 < s.starts.size(); ++i) ragged = ragged || s.starts[i + 1] - s.starts[i] != s.starts[1];
        if (ordered && ragged) continue;
        const auto said = [&](bool ran, const char* part) {
          std::printf("  %s %s %s: %s\n", s.name().c_str(), part, ordered ? "ordered" : "", ran ? ("workspace " + std::to_string(cudnn.last_workspace())).c_str() : cudnn.why().c_str());
          return ran;
        };
        try {
          one_by<bf16>(s, Path{ordered ? "cudnn ordered" : "cudnn", [&](const Attention& a) {
                          const bool ran = said(cudnn.forward(ctx, a, std::int64_t{1} << 30), "forward");
                          if (ran && a.rows > a.host_starts[a.sequences]) check(cudaMemset2DAsync(static_cast<bf16*>(a.out) + a.host_starts[a.sequences] * a.out_stride, static_cast<std::size_t>(a.out_stride * 2), 0, static_cast<std::size_t>(a.heads * a.head_size * 2), static_cast<std::size_t>(a.rows - a.host_starts[a.sequences]), ctx.stream()), "dead rows");
                          return ran; },
                        [&](const Attention& a) {
                          const bool ran = said(cudnn.backward(ctx, a, ordered, ordered ? 8 << 20 : 1 << 30), "backward");
                          if (ran && a.rows > a.host_starts[a.sequences]) check(cudaMemset2DAsync(static_cast<bf16*>(a.dq) + a.host_starts[a.sequences] * a.dq_stride, static_cast<std::size_t>(a.dq_stride * 2), 0, static_cast<std::size_t>((a.heads + 2 * a.kv_heads) * a.head_size * 2), static_cast<std::size_t>(a.rows - a.host_starts[a.sequences]), ctx.stream()), "dead rows");
                          return ran; }, ordered});
        } catch (const std::exception& e) {
          report(false, "cudnn " + s.name(), e.what());
        }
      }
    cuda::CudnnAttention none(ctx);
    Problem<bf16> p(Shape{equal(2, 512), 8, 2, 128}, 0.1, 31);
    report(!none.forward(ctx, p.a, -1) && !none.why().empty(), "cudnn without room", "an engine was taken that wants more than is allowed");
    for (const bool ordered : {false, true})
      report(!none.backward(ctx, p.a, ordered, -1) && !none.why().empty(), "cudnn without room, backward", "an engine was taken that wants more than is allowed");
    cuda::CudnnAttention little(ctx);
    const std::int64_t room = 3 << 20;
    report(!little.backward(ctx, p.a, true, room) || little.last_workspace() <= room, "cudnn with little room, backward", "its plan works in more than is allowed");
  } catch (const std::exception& e) {
    report(false, "cudnn", e.what());
  }
#endif
  for (const std::int64_t window : {0, 1, 64, 100}) {
    for (const std::int64_t d : {32, 64, 96, 128, 192, 256}) stretches<bf16>(ctx, 4, 2, d, window);
    stretches<bf16>(ctx, 2, 1, 33, window), stretches<float>(ctx, 4, 2, 64, window), stretches<double>(ctx, 4, 2, 80, window);
  }
  ctx.attention_choice.cudnn = false;  // a row's bits are the own kernels' promise
  for (const std::int64_t d : {32, 64, 96, 128, 256}) rows_alone<bf16>(ctx, 6, 2, d), rows_alone<bf16>(ctx, 2, 2, d);
  rows_alone<float>(ctx, 4, 2, 64), rows_alone<double>(ctx, 4, 4, 80);
  for (const std::int64_t window : {1, 30, 64, 100}) {
    for (const std::int64_t d : {32, 64, 128, 256}) rows_alone<bf16>(ctx, 6, 2, d, window);
    rows_alone<float>(ctx, 4, 2, 64, window), rows_alone<double>(ctx, 4, 4, 80, window);
  }
}

}  // namespace gpu_test
