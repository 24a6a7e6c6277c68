#include "train/machine.h"

#include <capstan/tensor.h>
#include <kernels/cpu/context.h>
#include <kernels/cpu/gemm.h>

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>

namespace capstan::train {

double measure_gemm_rate(Device& device) {
  constexpr std::int64_t n = 768;
  const Tensor a = Tensor::full(Dims{n, n}, 0.5, DType::f32, device), b = a.clone(), c = a.clone();
  kernels::cpu::Gemm g;
  g.m = g.n = g.k = g.lda = g.ldb = g.ldc = n;
  double best = 0, spent = 0;
  for (int i = 0; i < 3 || (i < 12 && spent < 0.06); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    kernels::cpu::gemm(device.cpu(), g, a.raw(), b.raw(), c.raw());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    spent += seconds;
    best = std::max(best, 2.0 * n * n * n / seconds);
  }
  return best;
}

int thread_count(Device& device) { return device.cpu().threads(); }

std::string describe_machine(int threads) {
  std::string model = "CPU";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) {
      model = line.substr(line.find(':') + 2);
      break;
    }
  const double bytes = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  return fmt::format("{} {} of {}, {:.1f} GiB", threads, threads == 1 ? "thread" : "threads", model, bytes / (1 << 30));
}

}  // namespace capstan::train
