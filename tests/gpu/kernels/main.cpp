// capstan_gpu_kernels test|small [rows|attention]: the CUDA kernels against f64 references, over many shapes, or a few small
// ones for slow tools. capstan_gpu_kernels bench [small]: attention's own kernels beside cuDNN's (`capstan bench gpu` has the rest).
#include "harness.h"

#include <stdexcept>

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
    bench_attention(ctx, part == "small");
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n", e.what());
    return 2;
  }
  return 0;
}
