#include "train/machine.h"

#include <kernels/backend.h>
#include <kernels/cpu/context.h>

#include <fmt/format.h>
#include <unistd.h>

#include <fstream>

namespace capstan::train {

double measure_gemm_rate(Device& device, DType dtype) { return device.backend().gemm_rate(static_cast<kernels::Num>(dtype)); }

int thread_count(Device& device) { return device.cpu().threads(); }

std::string describe_machine(Device& device) {
  std::string model = "CPU";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) {
      model = line.substr(line.find(':') + 2);
      break;
    }
  const int threads = thread_count(device);
  const double bytes = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const std::string host = fmt::format("{} {} of {}, {:.1f} GiB", threads, threads == 1 ? "thread" : "threads", model, bytes / (1 << 30));
  return device.kind() == DeviceKind::cuda ? device.describe() + "; " + host : host;
}

}  // namespace capstan::train
