// capstan_gpu_kernels test|small [rows|attention]: the CUDA kernels against f64 references, over many shapes, or a few small
// ones for slow tools. capstan_gpu_kernels bench: attention's own kernels beside cuDNN's (`capstan bench gpu` has the rest).
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

}  // namespace gpu_test

int main(int argc, char** argv) {
  using namespace gpu_test;
  const std::string mode = argc > 1 ? argv[1] : "test", part = argc > 2 ? argv[2] : "all";
  try {
    Context ctx(0);
    if (mode == "test" || mode == "small") {
      if (part != "attention") test_rows(ctx, mode == "small"), test_scores(ctx, mode == "small"), test_fp8(ctx, mode == "small");
      if (part != "rows") test_attention(ctx, mode == "small");
      std::printf("%d checks passed, %d failed\n", passes, failures);
      return failures == 0 ? 0 : 1;
    }
    bench_attention(ctx);
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n", e.what());
    return 2;
  }
  return 0;
}
