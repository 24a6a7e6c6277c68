// The CUDA device: accounting over the memory of libcapstan_cuda.so, which lies beside this library and is opened when a GPU
// is asked for, so that a build with CUDA starts on machines without a driver.
#include "base/cuda_device.h"
#include "base/part.h"
#include "base/short_bytes.h"
#include "base/usable_threads.h"

#include <capstan/device.h>
#include <capstan/error.h>
#include <kernels/cpu/context.h>
#include <kernels/cuda/gpu.h>
#include <kernels/queue.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace capstan {

namespace {

namespace cuda = kernels::cuda;

std::int64_t round_up(std::int64_t n) { return (std::max<std::int64_t>(n, 1) + 255) / 256 * 256; }

std::string amount(std::int64_t bytes) { return short_bytes(static_cast<double>(bytes)); }

template <class Function>
Function open_library(const char* name, std::string& why) { return reinterpret_cast<Function>(open_part(cuda_part(), name, why)); }

class CudaDevice final : public Device {
 public:
  CudaDevice(std::unique_ptr<cuda::Gpu> gpu, int threads) : gpu_(std::move(gpu)), host_(threads) {
    gpu_->explain_memory([this] { return memory(); });
  }
  DeviceKind kind() const override { return DeviceKind::cuda; }
  kernels::Backend& backend() override { return *gpu_; }
  cuda::Gpu& gpu() { return *gpu_; }
  kernels::cpu::Context& cpu() override { return host_; }
  std::string describe() const override { return gpu_->name() + ", " + amount(gpu_->capacity()); }

  void* allocate(std::int64_t bytes) override {
    const std::int64_t size = round_up(bytes);
    std::lock_guard lock(mutex_);
    void* data = gpu_->allocate(size);
    if (data == nullptr) {
      fail(Fault::runtime, "cuda memory", "cannot allocate " + std::to_string(bytes) + " bytes (" + amount(bytes) + "): " + words());
    }
    count(size);
    if (holding_ != Holding::rest) {
      named_.emplace(data, holding_);
      held_as_[static_cast<std::size_t>(holding_)] += size;
    }
    return data;
  }

  void release(void* data, std::int64_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    gpu_->release(data);
    count(-round_up(bytes));
    if (const auto it = named_.find(data); it != named_.end()) {
      held_as_[static_cast<std::size_t>(it->second)] -= round_up(bytes);
      named_.erase(it);
    }
  }

  /// Returns what was named before.
  Holding hold_as(Holding what) {
    std::lock_guard lock(mutex_);
    return std::exchange(holding_, what);
  }
  std::int64_t bytes_reserved() const override { return gpu_->reserved(); }

  void count_communication(std::int64_t bytes) {
    std::lock_guard lock(mutex_);
    communication_ += bytes;
    count(bytes);
  }
  std::int64_t communication() const {
    std::lock_guard lock(mutex_);
    return communication_;
  }
  std::string memory() const {
    std::lock_guard lock(mutex_);
    return words();
  }

 private:
  std::string words() const {
    const std::int64_t tensors = bytes_held() - communication_;
    std::int64_t rest = tensors;
    for (const std::int64_t n : held_as_) rest -= n;
    const auto as = [&](Holding what) { return amount(held_as_[static_cast<std::size_t>(what)]); };
    const std::int64_t records = gpu_->queue()->record_bytes();
    return "tensors hold " + amount(tensors) + " (weights " + as(Holding::weights) + ", gradients " + as(Holding::gradients) + ", optimizer state " + as(Holding::optimizer) +
           ", activations and the rest " + amount(rest) + ")" + (communication_ > 0 ? ", NCCL " + amount(communication_) + " (its communicators, and memory registered with them)" : "") +
           ", the pool has " + amount(gpu_->reserved()) + " from the driver" + (records > 0 ? ", " + amount(records) + " of it for recorded steps" : "") + ", " + amount(gpu_->available()) + " of " + amount(gpu_->capacity()) +
           " are free for anyone; a smaller data.micro_batch or data.sequence_length, train.recompute=block, or precision.compute=bf16 lowers the need" +
           (records > 0 ? ", run.cuda_graphs=off (inference.cuda_graphs, when text is written) that of recorded steps" : "") +
           (communication_ > 0 ? ", and more ranks along mesh.shard with mesh.strategy: fsdp that of each" : "");
  }
  mutable std::mutex mutex_;
  std::unique_ptr<cuda::Gpu> gpu_;
  kernels::cpu::Context host_;
  std::int64_t communication_ = 0;
  Holding holding_ = Holding::rest;
  std::unordered_map<const void*, Holding> named_;  // few: what is taken once for a run
  std::array<std::int64_t, 4> held_as_{};           // by Holding
};

CudaDevice& cuda_device(Device& device) {
  if (device.kind() != DeviceKind::cuda) fail(Fault::programming, "device", "expected a GPU, got a " + std::string(device.name()) + " device");
  return static_cast<CudaDevice&>(device);
}

}  // namespace

HoldingAs::HoldingAs(Device& device, Holding what) {
  if (device.kind() != DeviceKind::cuda) return;
  device_ = &device, before_ = cuda_device(device).hold_as(what);
}
HoldingAs::~HoldingAs() {
  if (device_ != nullptr) cuda_device(*device_).hold_as(before_);
}

std::string cuda_problem() {
  std::string why;
  const auto open = open_library<cuda::OpenGpu>("capstan_cuda_open", why);
  if (open == nullptr) return why;
  char message[1024] = "";
  open(cuda::gpu_interface, -1, message, sizeof message);
  return message;
}

int cuda_device_count() {
  std::string why;
  const auto count = open_library<cuda::CountGpus>("capstan_cuda_count", why);
  return count == nullptr ? 0 : count();
}

kernels::cuda::Gpu& gpu_of(Device& device) { return cuda_device(device).gpu(); }
void count_communication(Device& device, std::int64_t bytes) { cuda_device(device).count_communication(bytes); }
std::int64_t communication_bytes(Device& device) { return cuda_device(device).communication(); }
std::string memory_words(Device& device) { return cuda_device(device).memory(); }

std::shared_ptr<Device> make_cuda_device(int index, int threads) {
  std::string why;
  const auto open = open_library<cuda::OpenGpu>("capstan_cuda_open", why);
  if (open == nullptr) fail(Fault::input, "cuda", why);
  char message[1024] = "";
  std::unique_ptr<cuda::Gpu> gpu(open(cuda::gpu_interface, std::max(index, 0), message, sizeof message));
  if (!gpu) fail(Fault::input, "cuda", message);
  return std::make_shared<CudaDevice>(std::move(gpu), usable_threads(threads));
}

}  // namespace capstan
