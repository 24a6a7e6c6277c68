// `gpu_bench`: what this GPU can do (copies, products), then the core's kernels as shares of that. One line each.
#include <capstan/ops.h>
#include <capstan/random.h>
#include <capstan/update.h>
#include <kernels/backend.h>
#include <kernels/shared/fp8.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace {

using namespace capstan;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Seconds of one call: the median of nine groups of `calls`, after a warm-up.
double seconds(Device& device, int calls, const std::function<void()>& work) {
  for (int i = 0; i < 3; ++i) work();
  device.synchronize();
  std::vector<double> times;
  for (int group = 0; group < 9; ++group) {
    const double begin = now();
    for (int i = 0; i < calls; ++i) work();
    device.synchronize();
    times.push_back((now() - begin) / calls);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

Tensor random_tensor(const Dims& shape, DType dtype, Device& device, std::uint64_t seed) {
  const std::int64_t n = shape.product();
  std::vector<float> values(static_cast<std::size_t>(n));
  const Rng rng(seed, "bench");
  for (std::int64_t i = 0; i < n; ++i) values[static_cast<std::size_t>(i)] = static_cast<float>(rng.bits(static_cast<std::uint64_t>(i))) * 0x1p-31f - 1.0f;
  return Tensor::of(std::span<const float>(values), shape, device).to(dtype);
}

}  // namespace

int main() {
  try {
    const auto device = make_cuda_device();
    Device& gpu = *device;
    std::printf("%s\n", gpu.describe().c_str());
    const std::int64_t n = std::int64_t{1} << 28;
    const Tensor big = random_tensor(Dims{1 << 24}, DType::f32, gpu, 1);
    Tensor a = Tensor::empty(Dims{n}, DType::f32, gpu), b = Tensor::empty(Dims{n}, DType::f32, gpu);
    for (std::int64_t at = 0; at < n; at += big.numel()) a.narrow(0, at, big.numel()).copy_from(big);
    const double copy = 8.0 * static_cast<double>(n) / seconds(gpu, 4, [&] { b.copy_from(a); });
    std::printf("%-44s %9.0f GB/s\n", "copy of 1 GiB, read and written", copy * 1e-9);

    const auto stream = [&](const char* name, double bytes, const std::function<void()>& work) {
      const double rate = bytes / seconds(gpu, 4, work);
      std::printf("%-44s %9.0f GB/s %6.1f %% of the copy\n", name, rate * 1e-9, 100 * rate / copy);
      std::fflush(stdout);
    };
    const auto d = [](std::int64_t x) { return static_cast<double>(x); };
    const std::int64_t m = std::int64_t{1} << 27;
    const Tensor narrow = a.narrow(0, 0, m).to(DType::bf16), narrow2 = Tensor::empty(Dims{m}, DType::bf16, gpu), wide = a.narrow(0, 0, m);
    stream("cast f32 to bf16", 6 * d(m), [&] { narrow2.copy_from(wide); });
    stream("cast bf16 to f32", 6 * d(m), [&] { b.narrow(0, 0, m).copy_from(narrow); });
    stream("gelu, bf16 (with its allocation)", 4 * d(m), [&] { ops::gelu(narrow); });
    stream("add, bf16", 6 * d(m), [&] { ops::add(narrow, narrow2); });
    const Tensor rows = narrow.view(Dims{16384, 8192}), swi = ops::swiglu(rows);
    stream("swiglu, bf16 [16384, 8192]", 3 * d(m), [&] { ops::swiglu(rows); });
    {
      kernels::Quantize q;
      q.rows = 16384, q.cols = q.stride = 8192, q.x = rows.raw();
      const kernels::Fp8Places at = kernels::fp8_places(q.scaling, q.rows, q.cols, true, true);
      const Tensor bytes = Tensor::empty(Dims{at.bytes}, DType::u8, gpu);
      std::uint8_t* base = bytes.data<std::uint8_t>();
      q.data = base + at.data, q.scale = base + at.scale, q.turned = base + at.turned, q.turned_scale = base + at.turned_scale;
      stream("quantize to e4m3, straight and turned, bf16", 6 * d(m), [&] { gpu.backend().quantize(q); });
      q.turned = q.turned_scale = nullptr;
      stream("quantize to e4m3, straight, bf16", 5 * d(m), [&] { gpu.backend().quantize(q); });
    }
    stream("column slice copy, bf16 [16384, 2048 of 8192]", 4 * 16384.0 * 2048, [&] { rows.narrow(1, 1024, 2048).contiguous(); });
    stream("transposing copy, bf16 [16384, 8192]", 4 * d(m), [&] { rows.transposed(0, 1).contiguous(); });
    stream("sum over rows, f32 [16384, 8192]", 4 * d(m), [&] { ops::sum(wide.view(Dims{16384, 8192}), 0); });
    stream("sum over columns, f32 [16384, 8192]", 4 * d(m), [&] { ops::sum(wide.view(Dims{16384, 8192}), 1); });
    {
      const std::int64_t p = std::int64_t{1} << 27;
      const Tensor value = a.narrow(0, 0, p).clone(), grad = a.narrow(0, p, p), first = Tensor::zeros(Dims{p}, DType::f32, gpu), second = first.clone();
      update::AdamW step;
      step.rate = 1e-4, step.beta1_rest = 0.1, step.beta2 = 0.95, step.beta2_rest = 0.05, step.epsilon = 1e-8;
      stream("AdamW, f32, 134 M weights", 28 * d(p), [&] { update::adamw(step, value, grad, first, second); });
    }

    const auto product = [&](const char* name, DType dtype, std::int64_t rows_of_x, std::int64_t out, std::int64_t in, double limit) {
      const Tensor x = random_tensor(Dims{rows_of_x, in}, dtype, gpu, 2), w = random_tensor(Dims{out, in}, dtype, gpu, 3);
      const double rate = 2.0 * d(rows_of_x) * d(out) * d(in) / seconds(gpu, 10, [&] { ops::linear(x, w); });
      std::printf("%-44s %9.1f TFLOP/s", name, rate * 1e-12);
      if (limit > 0) std::printf(" %6.1f %% of the first", 100 * rate / limit);
      std::printf("\n");
      std::fflush(stdout);
      return rate;
    };
    const double peak = product("product, bf16, 8192 x 8192 x 8192", DType::bf16, 8192, 8192, 8192, 0);
    product("  32768 x 2304 x 768 (GPT-2 qkv)", DType::bf16, 32768, 2304, 768, peak);
    product("  32768 x 768 x 3072 (GPT-2 down)", DType::bf16, 32768, 768, 3072, peak);
    product("  16384 x 6400 x 1600 (GPT-2 XL up)", DType::bf16, 16384, 6400, 1600, peak);
    product("  16384 x 28672 x 4096 (Llama-3-8B gate, up)", DType::bf16, 16384, 28672, 4096, peak);
    if (gpu.backend().fp8_problem(kernels::Scaling::tensor).empty()) {
      const double narrow = gpu.backend().gemm_rate(kernels::Num::f8e4m3);
      std::printf("%-44s %9.1f TFLOP/s %6.1f %% of the first\n", "product, e4m3, 8192 x 8192 x 8192", narrow * 1e-12, 100 * narrow / peak);
    }
    product("product, f32, 4096 x 4096 x 4096", DType::f32, 4096, 4096, 4096, 0);
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gpu_bench: %s\n", e.what());
    return 1;
  }
}
