// defines: measure_gemm_rate(): the limit that a run's speed is held against.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>

#include <string>

namespace capstan::train {

/// FLOP/s of a large matrix product on this device, the best of a few: about 60 ms of work. The CPU's limit is f32's.
CAPSTAN_API double measure_gemm_rate(Device& device, DType dtype = DType::f32);
/// Threads of the host.
CAPSTAN_API int thread_count(Device& device);
/// "2 threads of Intel(R) Xeon(R) Processor, 23.4 GiB", after the GPU's name where that is the device.
CAPSTAN_API std::string describe_machine(Device& device);

}  // namespace capstan::train
