// defines: measure_gemm_rate(): the limit that a run's speed is held against.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>

#include <string>

namespace capstan::train {

/// FLOP/s of a large f32 matrix product on this device, the best of a few: about 60 ms of work.
CAPSTAN_API double measure_gemm_rate(Device& device);
/// Threads of a CPU device.
CAPSTAN_API int thread_count(Device& device);
/// "2 threads of Intel(R) Xeon(R) Processor, 23.4 GiB"
CAPSTAN_API std::string describe_machine(int threads);

}  // namespace capstan::train
