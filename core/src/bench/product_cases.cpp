// Products and attention: what the rate of products holds back. FLOP are the model's: causal attention counts the pairs
// that it looks at once, backward 2.5 times its forward (the scores made again included, as the field's figures do).
#include "bench/cases.h"
#include "bench/operands.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

namespace capstan::bench {

namespace {

using kernels::Num;

Case product(Device& device, std::string name, DType dtype, std::int64_t m, std::int64_t n, std::int64_t k) {
  return {std::move(name), Bound::products(dtype), 2 * real(m) * real(n) * real(k), [=, &device]() -> std::function<void()> {
            kernels::Gemm g;
            g.a = g.b = g.c = static_cast<Num>(dtype);
            g.trans_b = true, g.m = m, g.n = n, g.k = k, g.lda = g.ldb = k, g.ldc = n;
            return [g, x = random_tensor(device, {m, k}, dtype, 1), w = random_tensor(device, {n, k}, dtype, 2), y = Tensor::empty({m, n}, dtype, device), &device] {
              device.backend().gemm(g, x.raw(), w.raw(), y.raw());
            };
          }};
}

struct Shape { std::int64_t sequences, length, heads, kv_heads, head_size, window; };

/// Operands of attention over equal sequences: q, k, v as slices of one projection, as layers have them.
struct AttentionOperands {
  std::vector<std::int32_t> host_starts;
  Tensor starts, qkv, out, lse, dout, grads;
  kernels::Attention a;

  AttentionOperands(Device& device, const Shape& s, bool any_order) {
    for (std::int64_t i = 0; i <= s.sequences; ++i) host_starts.push_back(static_cast<std::int32_t>(i * s.length));
    const std::int64_t rows = s.sequences * s.length, wide = s.heads * s.head_size, narrow = s.kv_heads * s.head_size, stride = wide + 2 * narrow;
    starts = Tensor::of<std::int32_t>(host_starts, {s.sequences + 1}, device);
    qkv = random_tensor(device, {rows, stride}, DType::bf16, 1), dout = random_tensor(device, {rows, wide}, DType::bf16, 2);
    out = Tensor::empty({rows, wide}, DType::bf16, device), grads = Tensor::empty({rows, stride}, DType::bf16, device);
    lse = Tensor::empty({s.heads, rows}, DType::f32, device);
    a.num = Num::bf16, a.q = qkv.raw(), a.k = qkv.narrow(1, wide, narrow).raw(), a.v = qkv.narrow(1, wide + narrow, narrow).raw(), a.out = out.raw();
    a.q_stride = a.k_stride = a.v_stride = a.dq_stride = a.dkv_stride = stride, a.out_stride = a.dout_stride = wide;
    a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_size = s.head_size, a.window = s.window, a.scale = 1 / std::sqrt(real(s.head_size));
    a.host_starts = host_starts.data(), a.starts = starts.data<std::int32_t>(), a.sequences = s.sequences, a.rows = rows, a.longest = s.length;
    a.lse = lse.raw(), a.any_order = any_order, a.dout = dout.raw();
    a.dq = grads.raw(), a.dk = grads.narrow(1, wide, narrow).raw(), a.dv = grads.narrow(1, wide + narrow, narrow).raw();
    device.backend().attention(a);  // the backward reads its results
  }
};

}  // namespace

Case square_case(Device& device, Size size, DType dtype) {
  const std::int64_t n = fewer(size == Size::small, dtype == DType::bf16 ? 8192 : 4096, 64);
  return product(device, fmt::format("product {} {} x {} x {}", name_of(dtype), n, n, n), dtype, n, n, n);
}

std::vector<Case> product_cases(Device& device, Size size) {
  struct Shape { const char* name; std::int64_t m, n, k; };
  std::vector<Case> all;
  const std::int64_t less = fewer(size == Size::small, 1, 64);
  for (const Shape& s : {Shape{"GPT-2 124M qkv", 32768, 2304, 768}, Shape{"GPT-2 124M down", 32768, 768, 3072}, Shape{"GPT-2 1.5B up", 16384, 6400, 1600},
                         Shape{"Qwen2.5-1.5B gate, up", 16384, 17920, 1536}, Shape{"Llama-3-8B gate, up", 16384, 28672, 4096}, Shape{"Llama-3-8B down", 16384, 4096, 14336}}) {
    const std::int64_t m = s.m / less, n = s.n / less, k = s.k / less;
    all.push_back(product(device, fmt::format("product bf16 {} x {} x {} ({})", m, n, k, s.name), DType::bf16, m, n, k));
  }
  return all;
}

std::vector<Case> attention_cases(Device& device, Size size) {
  const std::vector<Shape> whole{{64, 1024, 12, 12, 64, 0}, {32, 1024, 25, 25, 64, 0}, {8, 2048, 64, 8, 128, 0}, {4, 4096, 64, 8, 128, 0},
                                 {2, 8192, 64, 8, 128, 0}, {4, 4096, 32, 8, 128, 0}, {4, 4096, 14, 2, 64, 0}, {4, 4096, 64, 8, 64, 1024}};
  const std::vector<Shape> small{{2, 70, 4, 2, 16, 0}, {1, 100, 2, 1, 16, 33}};
  std::vector<Case> all;
  for (const Shape& s : size == Size::small ? small : whole) {
    const double most = real(s.window > 0 ? std::min(s.window, s.length) : s.length), length = real(s.length);
    // The usual figure for causal attention is half of the square; a window has what lies in it.
    const double pairs = s.window > 0 ? most * most / 2 + (length - most) * most : length * length / 2;
    const double forward = 4 * real(s.sequences * s.heads * s.head_size) * pairs;
    const std::string of = fmt::format(" {} x {}, {}/{} heads of {}{}", s.sequences, s.length, s.heads, s.kv_heads, s.head_size, s.window > 0 ? fmt::format(", window {}", s.window) : "");
    const auto add = [&](const char* name, double flop, bool backward, bool any_order) {
      all.push_back({name + of, Bound::products(DType::bf16), flop, [=, &device]() -> std::function<void()> {
                       const auto o = std::make_shared<AttentionOperands>(device, s, any_order);
                       return [o, backward, &device] { backward ? device.backend().attention_backward(o->a) : device.backend().attention(o->a); };
                     }});
    };
    add("attention", forward, false, false);
    add("  backward, one order", 2.5 * forward, true, false);
    add("  backward, any order", 2.5 * forward, true, true);
  }
  return all;
}

}  // namespace capstan::bench
