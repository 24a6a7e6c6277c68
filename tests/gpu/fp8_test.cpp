// fp8 on the CUDA device: the CPU's bytes and scales, products against f64, what a chip refuses.
#include "core/ops/fp8_check.h"

#include <kernels/backend.h>

#include <cstdlib>

namespace capstan::testing {
namespace {

using Kind = LinearPrecision::Kind;

/// The emulated GPU is of the generation that the environment names when it is opened; a real one is what it is.
std::shared_ptr<Device> gpu_of(const char* major) {
  ::setenv("EMULATED_GPU_MAJOR", major, 1);
  auto device = make_cuda_device();
  ::unsetenv("EMULATED_GPU_MAJOR");
  return device;
}

TEST(GpuFp8, QuantizesToTheCpusBytes) {
  auto gpu = make_cuda_device(), cpu = make_cpu_device(2);
  for (const kernels::Scaling scaling : {kernels::Scaling::tensor, kernels::Scaling::block})
    for (const DType from : {DType::f32, DType::bf16})
      for (const DType to : {DType::f8e4m3, DType::f8e5m2})
        for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{1, 32}, {37, 96}, {200, 160}}) {
          const kernels::Fp8Places at = kernels::fp8_places(scaling, rows, cols, true, true);
          const auto bytes = [&](Device& d) {
            const Tensor x = make(d, uneven(rows, cols, 1, from), Dims{rows, cols}, from),
                         out = Tensor::zeros(Dims{at.bytes}, DType::u8, d);
            std::uint8_t* base = out.data<std::uint8_t>();
            kernels::Quantize q;
            q.from = static_cast<kernels::Num>(from), q.to = static_cast<kernels::Num>(to), q.scaling = scaling;
            q.rows = rows, q.cols = q.stride = cols, q.x = x.raw();
            q.data = base + at.data, q.scale = base + at.scale, q.turned = base + at.turned,
            q.turned_scale = base + at.turned_scale;
            d.backend().quantize(q);
            return bits(out);
          };
          EXPECT_EQ(bytes(*gpu), bytes(*cpu)) << rows << " x " << cols << " " << name_of(from) << " " << name_of(to);
        }
}

TEST(GpuFp8, MultipliesInFp8) {
  auto gpu = make_cuda_device();
  for (const Fp8Linear& c : fp8_linears(Kind::fp8)) {
    const LinearResult first = run_linear(*gpu, c), again = run_linear(*gpu, c);
    expect_linear(first, c);
    for (const auto part : {&LinearResult::y, &LinearResult::dx, &LinearResult::dw, &LinearResult::db})
      EXPECT_TRUE(same_bits(first.*part, again.*part));
  }
}

TEST(GpuFp8, MultipliesInMxfp8WhereTheChipCan) {
  auto gpu = gpu_of("10");
  if (!gpu->backend().fp8_problem(kernels::Scaling::block).empty())
    GTEST_SKIP() << gpu->backend().fp8_problem(kernels::Scaling::block);
  for (const Fp8Linear& c : fp8_linears(Kind::mxfp8)) expect_linear(run_linear(*gpu, c), c);
}

TEST(GpuFp8, IsFollowedByGelu) {
  auto gpu = gpu_of("9"), blocks = gpu_of("10");
  for (const Fp8Linear& c : fp8_linears(Kind::fp8)) expect_gelu(*gpu, c);
  if (!blocks->backend().fp8_problem(kernels::Scaling::block).empty()) return;
  for (const Fp8Linear& c : fp8_linears(Kind::mxfp8)) expect_gelu(*blocks, c);
}

TEST(GpuFp8, SaysWhichScalesItCannotTake) {
  auto gpu = gpu_of("9");
  EXPECT_EQ(gpu->backend().fp8_problem(kernels::Scaling::tensor), "");
  const std::string block = gpu->backend().fp8_problem(kernels::Scaling::block);
  if (gpu->describe().find("emulated") != std::string::npos || gpu->describe().find("H200") != std::string::npos) {
    EXPECT_EQ(block,
              "this GPU has compute capability 9.0, block scales (mxfp8) need 10.0: expected precision.linear=fp8, or "
              "run.device=cpu, which computes the same numbers slowly");
  }
}

}  // namespace
}  // namespace capstan::testing
