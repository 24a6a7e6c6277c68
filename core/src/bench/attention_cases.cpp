// Attention as training runs it. FLOP are the model's: causal attention counts the pairs that it looks at once, backward 2.5 times
// its forward (the scores made again included, as the field's figures do).
#include "bench/cases.h"
#include "bench/operands.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace capstan::bench {

namespace {

using kernels::Num;

/// forward_tflops, backward_tflops: cuDNN's in its own benchmark of the same heads, length and window (sdpa_benchmark_training of
/// cudnn-frontend, one sequence, with a window two), the backward's sums in any order; 0: it has none.
struct Shape { std::int64_t sequences, length, heads, kv_heads, head_size, window; double forward_tflops = 0, backward_tflops = 0; };
constexpr const char* reference = "cuDNN 9.19.1, H200";

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

std::vector<Case> attention_cases(Device& device, Size size) {
  const std::vector<Shape> whole{{64, 1024, 12, 12, 64, 0}, {32, 1024, 25, 25, 64, 0}, {8, 2048, 64, 8, 128, 0, 484, 370}, {4, 4096, 64, 8, 128, 0, 591, 474},
                                 {2, 8192, 64, 8, 128, 0, 644, 541}, {4, 4096, 32, 8, 128, 0}, {4, 4096, 14, 2, 64, 0}, {4, 4096, 64, 8, 64, 1024, 336, 289}};
  const std::vector<Shape> small{{2, 70, 4, 2, 16, 0}, {1, 100, 2, 1, 16, 33, 1, 2}};
  std::vector<Case> all;
  for (const Shape& s : size == Size::small ? small : whole) {
    const double most = real(s.window > 0 ? std::min(s.window, s.length) : s.length), length = real(s.length);
    // The usual figure for causal attention is half of the square; a window has what lies in it.
    const double pairs = s.window > 0 ? most * most / 2 + (length - most) * most : length * length / 2;
    const double forward = 4 * real(s.sequences * s.heads * s.head_size) * pairs;
    const std::string of = fmt::format(" {} x {}, {}/{} heads of {}{}", s.sequences, s.length, s.heads, s.kv_heads, s.head_size, s.window > 0 ? fmt::format(", window {}", s.window) : "");
    const auto add = [&](const char* name, double flop, bool backward, bool any_order, double tflops) {
      all.push_back({name + of, Bound::products(DType::bf16), flop, [=, &device]() -> std::function<void()> {
                       const auto o = std::make_shared<AttentionOperands>(device, s, any_order);
                       return [o, backward, &device] { backward ? device.backend().attention_backward(o->a) : device.backend().attention(o->a); };
                     }, {1e12 * tflops, reference}});
    };
    add("attention", forward, false, false, s.forward_tflops);
    add("  backward, one order", 2.5 * forward, true, false, 0);
    add("  backward, any order", 2.5 * forward, true, true, s.backward_tflops);
  }
  return all;
}

}  // namespace capstan::bench
