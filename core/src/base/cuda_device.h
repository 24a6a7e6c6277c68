// defines: gpu_of(), HoldingAs, cuda_device_count(): the GPU behind a device, for those who move its memory between ranks.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>
#include <kernels/cuda/gpu.h>

#include <cstdint>
#include <string>

namespace capstan {

/// Error(programming) when `device` is not a GPU.
CAPSTAN_API kernels::cuda::Gpu& gpu_of(Device& device);
/// Counts memory that a library of collectives took from the GPU (a negative number: gave back) in bytes_held(), and apart in
/// what is said when memory runs out.
CAPSTAN_API void count_communication(Device& device, std::int64_t bytes);
/// What count_communication() came to.
CAPSTAN_API std::int64_t communication_bytes(Device& device);
/// "tensors hold 3.1 GiB, ...": who has the GPU's memory, and which keys lower the need, for the message that there is none left.
CAPSTAN_API std::string memory_words(Device& device);
/// What memory is for, in the message that there is none left; what nobody names is activations and the rest.
enum class Holding : unsigned char { rest, weights, gradients, optimizer };
/// While it lives, what is taken of `device` counts as `what` until it is given back. Nothing for other devices than GPUs. One thread.
class CAPSTAN_API HoldingAs {
 public:
  HoldingAs(Device& device, Holding what);
  ~HoldingAs();
  HoldingAs(const HoldingAs&) = delete;
  HoldingAs& operator=(const HoldingAs&) = delete;

 private:
  Device* device_ = nullptr;
  Holding before_ = Holding::rest;
};
/// GPUs that this process sees; 0 when it can use none.
CAPSTAN_API int cuda_device_count();

}  // namespace capstan
