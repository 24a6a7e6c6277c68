// The kernels' speed: bytes a second as a share of this chip's measured copy, FLOP/s for attention.
#include "harness.h"

#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#include <kernels/cuda/rows.h>
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#endif

#include <algorithm>
#include <cmath>

namespace gpu_test {

namespace cuda = capstan::kernels::cuda;
using capstan::kernels::Attention;

void bench_rows(Context& ctx, double copy_rate) {
  std::printf("%-44s %10s %10s %8s\n", "kernel", "us", "GB/s", "of copy");
  const auto line = [&](const std::string& name, double bytes, double seconds) {
    std::printf("%-44s %10.1f %10.0f %7.1f%%\n", name.c_str(), seconds * 1e6, bytes / seconds * 1e-9, 100 * bytes / seconds / copy_rate);
    std::fflush(stdout);
  };
  for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{65536, 768}, {32768, 1600}, {16384, 4096}, {8192, 8192}, {4096, 16384}, {131072 * 4, 128}}) {
    const std::int64_t n = rows * cols, blocks = cuda::norm_blocks(ctx, rows, cols);
    const int sets = 3;
    std::vector<std::unique_ptr<Buffer<bf16>>> x, y, g;
    const auto values = many_values<bf16>(n, 1);
    for (int i = 0; i < sets; ++i)
      x.push_back(std::make_unique<Buffer<bf16>>(values)), g.push_back(std::make_unique<Buffer<bf16>>(values)), y.push_back(std::make_unique<Buffer<bf16>>(n));
    const Buffer<float> w(random_values<float>(cols, 2)), b(random_values<float>(cols, 3));
    Buffer<float> inverse(rows), mean(rows), partial(blocks * cols), partial_b(blocks * cols);
    const std::string shape = " bf16 " + std::to_string(rows) + " x " + std::to_string(cols);
    const double bytes = static_cast<double>(n) * 2;
    const auto at = [&](auto& v, int i) { return v[static_cast<std::size_t>(i % sets)]->data(); };
    line("rms_norm" + shape, 2 * bytes, median_seconds(ctx, 30, [&](int i) { cuda::rms_norm(ctx, Num::bf16, rows, cols, at(x, i), w.data(), 1e-5, at(y, i), inverse.data()); }));
    line("rms_norm_backward" + shape, 3 * bytes + 4.0 * static_cast<double>(blocks * cols), median_seconds(ctx, 30, [&](int i) {
      cuda::rms_norm_backward(ctx, Num::bf16, rows, cols, at(x, i), w.data(), inverse.data(), at(g, i), at(y, i), partial.data()); }));
    line("layer_norm" + shape, 2 * bytes, median_seconds(ctx, 30, [&](int i) {
      cuda::layer_norm(ctx, Num::bf16, rows, cols, at(x, i), w.data(), b.data(), 1e-5, at(y, i), mean.data(), inverse.data()); }));
    line("layer_norm_backward" + shape, 3 * bytes + 8.0 * static_cast<double>(blocks * cols), median_seconds(ctx, 30, [&](int i) {
      cuda::layer_norm_backward(ctx, Num::bf16, rows, cols, at(x, i), w.data(), mean.data(), inverse.data(), at(g, i), at(y, i), partial.data(), partial_b.data()); }));
    line("softmax" + shape, 2 * bytes, median_seconds(ctx, 30, [&](int i) { cuda::softmax(ctx, Num::bf16, rows, cols, at(x, i), at(y, i), false); }));
    line("softmax_backward" + shape, 3 * bytes, median_seconds(ctx, 30, [&](int i) { cuda::softmax_backward(ctx, Num::bf16, rows, cols, at(x, i), at(g, i), at(y, i), false); }));
  }
  for (const std::int64_t cols : {32000, 50304, 128256, 151936}) {
    const std::int64_t rows = 2048;
    Buffer<float> logits(many_values<float>(rows * cols, 1, 2)), lp(rows), lse(rows), h(rows);
    Buffer<bf16> small(rows * cols);
    const Buffer<float> weights(std::vector<float>(static_cast<std::size_t>(rows), 1e-3f));
    const Buffer<std::int32_t> targets(std::vector<std::int32_t>(static_cast<std::size_t>(rows), 17));
    capstan::kernels::ScoreRows s;
    s.rows = rows, s.cols = cols, s.stride = cols, s.logits = logits.data(), s.targets = targets.data();
    s.logprob = lp.data(), s.logsumexp = lse.data(), s.entropy = h.data();
    const std::string shape = " f32 " + std::to_string(rows) + " x " + std::to_string(cols);
    const double n = static_cast<double>(rows * cols);
    line("score_rows" + shape, 4 * n, median_seconds(ctx, 20, [&](int) { cuda::score_rows(ctx, s); }));
    s.weights = weights.data(), s.narrow = small.data();
    line("score_rows to bf16 gradient" + shape, 6 * n, median_seconds(ctx, 20, [&](int) { cuda::score_rows(ctx, s); }));
    s.narrow = nullptr;
    line("score_rows gradient in place" + shape, 8 * n, median_seconds(ctx, 20, [&](int) { cuda::score_rows(ctx, s); }));
    s.weights = nullptr, s.narrow = small.data(), s.g_logprob = lp.data();
    line("score_rows_backward" + shape, 6 * n, median_seconds(ctx, 20, [&](int) { cuda::score_rows_backward(ctx, s); }));
  }
  {
    const std::int64_t count = 65536, cols = 1600, table_rows = 50304;
    std::mt19937_64 random(5);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
    // Words follow Zipf's law: a few ids make up most of a text.
    for (auto& id : ids) id = static_cast<std::int32_t>(std::min<double>(static_cast<double>(table_rows) - 1, std::pow(static_cast<double>(table_rows), std::uniform_real_distribution<double>(0, 1)(random)) - 1));
    const Buffer<std::int32_t> d_ids(ids);
    Buffer<bf16> g(many_values<bf16>(count * cols, 2)), table(many_values<bf16>(table_rows * cols, 3));
    Buffer<float> grad(table_rows * cols);
    const double rows = static_cast<double>(count * cols);
    line("gather_rows bf16 65536 x 1600", 4 * rows, median_seconds(ctx, 20, [&](int) { cuda::gather_rows(ctx, count, cols * 2, table.data(), table_rows, d_ids.data(), g.data()); }));
    line("scatter_add_rows bf16 65536 x 1600 to f32, Zipf", 2 * rows + 4.0 * static_cast<double>(table_rows * cols), median_seconds(ctx, 20, [&](int) {
      cuda::scatter_add_rows(ctx, Num::bf16, count, cols, d_ids.data(), g.data(), table_rows, Num::f32, grad.data(), true); }));
  }
}

void bench_attention(Context& ctx) {
  const auto equal = [](std::int64_t count, std::int64_t length) {
    std::vector<std::int32_t> s{0};
    for (std::int64_t i = 0; i < count; ++i) s.push_back(static_cast<std::int32_t>(s.back() + length));
    return s;
  };
  std::printf("%-52s %12s %12s  TFLOP/s\n", "attention bf16, causal", "forward", "backward");
  struct Case { std::int64_t sequences, length, heads, kv_heads, head_size; };
  for (const Case& c : {Case{64, 1024, 12, 12, 64}, {32, 1024, 25, 25, 64}, {8, 2048, 64, 8, 128}, {4, 4096, 64, 8, 128}, {2, 8192, 64, 8, 128}, {4, 4096, 32, 8, 128},
                        {4, 4096, 14, 2, 64}, {4, 4096, 16, 16, 256}}) {
    const std::vector<std::int32_t> host_starts = equal(c.sequences, c.length);
    const std::int64_t hq = c.heads * c.head_size, hk = c.kv_heads * c.head_size, rows = host_starts.back(), stride = hq + 2 * hk;
    Buffer<bf16> qkv(many_values<bf16>(rows * stride, 1)), g(many_values<bf16>(rows * hq, 2)), out(rows * hq), grads(rows * stride);
    Buffer<float> lse(c.heads * rows);
    const Buffer<std::int32_t> starts(host_starts);
    Attention a;
    a.num = Num::bf16, a.q = qkv.data(), a.k = qkv.data() + hq, a.v = qkv.data() + hq + hk, a.out = out.data(), a.q_stride = a.k_stride = a.v_stride = stride;
    a.out_stride = hq, a.heads = c.heads, a.kv_heads = c.kv_heads, a.head_size = c.head_size, a.scale = 1 / std::sqrt(static_cast<double>(c.head_size));
    a.host_starts = host_starts.data(), a.starts = starts.data(), a.sequences = c.sequences, a.rows = rows, a.longest = c.length, a.lse = lse.data();
    a.dout = g.data(), a.dout_stride = hq, a.dq = grads.data(), a.dk = grads.data() + hq, a.dv = grads.data() + hq + hk, a.dq_stride = a.dkv_stride = stride;
    const double flops = 2.0 * static_cast<double>(c.sequences * c.length * c.length * c.heads * c.head_size);  // two products, half of the pairs
    const double forward = median_seconds(ctx, 20, [&](int) { cuda::attention_forward_tensor(ctx, a); });
    const double backward = median_seconds(ctx, 20, [&](int) {
      void* delta = ctx.scratch(a.heads * a.rows * 4);
      cuda::attention_delta(ctx, a, delta);
      cuda::attention_backward_tensor(ctx, a, delta);
    });
    char name[80];
    std::snprintf(name, sizeof name, "own    %3ld x %5ld, %2ld/%2ld heads of %3ld", static_cast<long>(c.sequences), static_cast<long>(c.length), static_cast<long>(c.heads),
                  static_cast<long>(c.kv_heads), static_cast<long>(c.head_size));
    const auto line = [&](const char* text, double f, double b) { std::printf("%-52s %12.0f %12.0f\n", text, flops / f * 1e-12, 2.5 * flops / b * 1e-12), std::fflush(stdout); };
    line(name, forward, backward);
#if defined(CAPSTAN_CUDNN)
    static cuda::CudnnAttention cudnn(ctx);
    const auto timed = [&](const std::function<bool()>& call) {
      try {
        if (call()) return median_seconds(ctx, 20, [&](int) { call(); });
        std::printf("  %s\n", cudnn.why().c_str());
      } catch (const std::exception& e) { std::printf("  %s\n", e.what()); }
      return 1e30;
    };
    const double cudnn_forward = timed([&] { return cudnn.forward(ctx, a); });
    line("  cudnn, free order", cudnn_forward, timed([&] { return cudnn.backward(ctx, a, false, 0); }));
    for (const std::int64_t limit : {std::int64_t{256} << 20, std::int64_t{1} << 30, std::int64_t{4} << 30}) {
      const double t = timed([&] { return cudnn.backward(ctx, a, true, limit); });
      char text[80];
      std::snprintf(text, sizeof text, "  cudnn, one order, workspace %ld MiB", static_cast<long>(cudnn.last_workspace() >> 20));
      line(text, 1e30, t);
    }
#endif
  }
}

}  // namespace gpu_test
