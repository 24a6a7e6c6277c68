// Attention's own kernels beside cuDNN's in their orders and workspaces: what `capstan bench gpu` cannot ask for.
#include "harness.h"

#include <kernels/cuda/attention.h>
#include <kernels/cuda/attention_own.h>
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>

namespace gpu_test {

namespace cuda = capstan::kernels::cuda;
using capstan::kernels::Attention;

namespace {

/// Median seconds of one call.
double median_seconds(Context& ctx, int repeats, const std::function<void()>& call) {
  call(), call();
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(repeats) + 1);
  for (cudaEvent_t& e : events) check(cudaEventCreate(&e), "event");
  check(cudaEventRecord(events[0], ctx.stream()), "event");
  for (int i = 0; i < repeats; ++i) {
    call();
    check(cudaEventRecord(events[static_cast<std::size_t>(i) + 1], ctx.stream()), "event");
  }
  check(cudaStreamSynchronize(ctx.stream()), "timing");
  std::vector<float> times;
  for (std::size_t i = 0; i + 1 < events.size(); ++i) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "timing");
    times.push_back(ms);
  }
  for (cudaEvent_t e : events) cudaEventDestroy(e);
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2] * 1e-3;
}

}  // namespace

void bench_attention(Context& ctx, bool small) {
  const auto equal = [](std::int64_t count, std::int64_t length) {
    std::vector<std::int32_t> s{0};
    for (std::int64_t i = 0; i < count; ++i) s.push_back(static_cast<std::int32_t>(s.back() + length));
    return s;
  };
  std::printf("%-52s %12s %12s  TFLOP/s\n", "attention bf16, causal", "forward", "backward");
  struct Case { std::int64_t sequences, length, heads, kv_heads, head_size; };
  const std::vector<Case> large{{64, 1024, 12, 12, 64}, {32, 1024, 25, 25, 64}, {8, 2048, 64, 8, 128}, {4, 4096, 64, 8, 128}, {2, 8192, 64, 8, 128}, {4, 4096, 32, 8, 128},
                                {4, 4096, 14, 2, 64}, {4, 4096, 16, 16, 256}};
  const int repeats = small ? 1 : 20;
  for (const Case& c : small ? std::vector<Case>{{2, 40, 2, 2, 64}, {1, 20, 2, 1, 128}} : large) {
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
    const double forward = median_seconds(ctx, repeats, [&] { cuda::attention_forward_tensor(ctx, a); });
    const double backward = median_seconds(ctx, repeats, [&] {
      void* delta = ctx.scratch(a.heads * a.rows * 4);
      cuda::attention_delta(ctx, a, delta);
      cuda::attention_backward_tensor(ctx, a, delta);
    });
    char name[80];
    std::snprintf(name, sizeof name, "own    %3ld x %5ld, %2ld/%2ld heads of %3ld", static_cast<long>(c.sequences), static_cast<long>(c.length), static_cast<long>(c.heads),
                  static_cast<long>(c.kv_heads), static_cast<long>(c.head_size));
    const auto line = [&](const char* text, double f, double b) { std::printf("%-52s %12.4g %12.4g\n", text, flops / f * 1e-12, 2.5 * flops / b * 1e-12), std::fflush(stdout); };
    line(name, forward, backward);
#if defined(CAPSTAN_CUDNN)
    constexpr double never = std::numeric_limits<double>::infinity();
    static cuda::CudnnAttention cudnn(ctx);
    const auto timed = [&](const std::function<bool()>& call) {
      try {
        if (call()) return median_seconds(ctx, repeats, [&] { call(); });
        std::printf("  %s\n", cudnn.why().c_str());
      } catch (const std::exception& e) { std::printf("  %s\n", e.what()); }
      return never;
    };
    const double cudnn_forward = timed([&] { return cudnn.forward(ctx, a, std::int64_t{1} << 30); });
    line("  cudnn, free order", cudnn_forward, timed([&] { return cudnn.backward(ctx, a, false, std::int64_t{1} << 30); }));
    for (const std::int64_t limit : {std::int64_t{256} << 20, std::int64_t{1} << 30, std::int64_t{4} << 30}) {
      cuda::CudnnAttention bounded(ctx);  // plans are kept with the limit that they were made under
      const double t = timed([&] { return bounded.backward(ctx, a, true, limit); });
      char text[80];
      std::snprintf(text, sizeof text, "  cudnn, one order, workspace %ld MiB", static_cast<long>(bounded.last_workspace() >> 20));
      line(text, never, t);
    }
#endif
  }
}

}  // namespace gpu_test
