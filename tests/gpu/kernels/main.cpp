// capstan_gpu_kernels test|bench [rows|attention]: the CUDA kernels against f64 references, and their speed.
#include "harness.h"

#include <algorithm>
#include <stdexcept>

namespace gpu_test {

double median_seconds(Context& ctx, int repeats, const std::function<void(int)>& call) {
  call(0), call(1);
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(repeats) + 1);
  for (cudaEvent_t& e : events) check(cudaEventCreate(&e), "event");
  check(cudaEventRecord(events[0], ctx.stream()), "event");
  for (int i = 0; i < repeats; ++i) {
    call(i);
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

namespace {

double copy_rate(Context& ctx) {
  const std::size_t bytes = std::size_t{2} << 30;
  void *a = nullptr, *b = nullptr;
  check(cudaMalloc(&a, bytes), "copy"), check(cudaMalloc(&b, bytes), "copy");
  check(cudaMemset(a, 0x3c, bytes), "copy");
  const double s = median_seconds(ctx, 20, [&](int) { check(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, ctx.stream()), "copy"); });
  cudaFree(a), cudaFree(b);
  return 2.0 * static_cast<double>(bytes) / s;
}

}  // namespace
}  // namespace gpu_test

int main(int argc, char** argv) {
  using namespace gpu_test;
  const std::string mode = argc > 1 ? argv[1] : "test", part = argc > 2 ? argv[2] : "all";
  try {
    Context ctx(0);
    if (mode == "test") {
      if (part != "attention") test_rows(ctx, false), test_scores(ctx, false), test_fp8(ctx, false);
      if (part != "rows") test_attention(ctx, false);
      std::printf("%d checks passed, %d failed\n", passes, failures);
      return failures == 0 ? 0 : 1;
    }
    const double rate = copy_rate(ctx);
    std::printf("copy bandwidth, read and written: %.0f GB/s\n", rate * 1e-9);
    if (part != "attention") bench_rows(ctx, rate);
    if (part != "rows") bench_attention(ctx);
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n", e.what());
    return 2;
  }
  return 0;
}
