// The CPU device: a caching pool over large mappings, because fresh pages are the slowest memory there is
// (docs/maintainers/performance.md), and the meta device, which only counts.
#include "base/usable_threads.h"

#include <capstan/device.h>
#include <capstan/error.h>
#include <kernels/cpu/backend.h>
#include <kernels/cpu/context.h>
#include <kernels/pool.h>

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

namespace capstan {

namespace {

constexpr std::int64_t alignment = 64;
constexpr std::int64_t huge_page = std::int64_t{2} << 20;
constexpr std::int64_t region_bytes = std::int64_t{64} << 20;

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

/// Regions for the pool, on huge pages. Nothing goes back to the system before the end, so a training step touches no fresh
/// page after the first.
char* map_region(std::int64_t bytes) {
  // Over-map and trim, so that the region starts on a huge page.
  void* raw = mmap(nullptr, static_cast<std::size_t>(bytes + huge_page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<std::int64_t>(raw), huge_page));
  const std::int64_t head = base - static_cast<char*>(raw);
  if (head > 0) munmap(raw, static_cast<std::size_t>(head));
  if (huge_page - head > 0) munmap(base + bytes, static_cast<std::size_t>(huge_page - head));
  madvise(base, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  return base;
}

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int threads)
      : pool_(map_region, [](char* base, std::int64_t bytes) { munmap(base, static_cast<std::size_t>(bytes)); }, alignment, region_bytes, huge_page),
        context_(usable_threads(threads)),
        backend_(context_),
        limit_(sysconf(_SC_PHYS_PAGES) * static_cast<std::int64_t>(sysconf(_SC_PAGESIZE))) {}
  DeviceKind kind() const override { return DeviceKind::cpu; }
  kernels::cpu::Context& cpu() override { return context_; }
  kernels::Backend& backend() override { return backend_; }

  void* allocate(std::int64_t bytes) override {
    const std::int64_t size = round_up(std::max<std::int64_t>(bytes, 1), alignment);
    std::lock_guard lock(mutex_);
    void* data = size + bytes_held() > limit_ ? nullptr : pool_.take(size);
    if (data == nullptr) {
      fail(Fault::runtime, "cpu memory",
           "cannot allocate " + std::to_string(bytes) + " bytes: " + std::to_string(bytes_held()) +
               " bytes are held by tensors, the machine has " + std::to_string(limit_) +
               "; a smaller data.micro_batch, data.sequence_length or train.recompute=block lowers the need");
    }
    count(size);
    return data;
  }

  void release(void* data, std::int64_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    pool_.give(data);
    count(-round_up(std::max<std::int64_t>(bytes, 1), alignment));
  }

  std::int64_t bytes_reserved() const override {
    std::lock_guard lock(mutex_);
    return pool_.reserved();
  }

 private:
  mutable std::mutex mutex_;
  kernels::Pool pool_;
  kernels::cpu::Context context_;
  kernels::cpu::CpuBackend backend_;
  std::int64_t limit_;
};

class MetaDevice final : public Device {
 public:
  DeviceKind kind() const override { return DeviceKind::meta; }
  void* allocate(std::int64_t bytes) override {
    count(round_up(std::max<std::int64_t>(bytes, 1), alignment));
    return nullptr;
  }
  void release(void*, std::int64_t bytes) noexcept override { count(-round_up(std::max<std::int64_t>(bytes, 1), alignment)); }
};

}  // namespace

int usable_threads(int threads) {
  if (threads > 0) return threads;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return static_cast<int>(std::max<long>(1, sysconf(_SC_NPROCESSORS_ONLN)));
  return std::max(1, CPU_COUNT(&set));
}

std::shared_ptr<Device> make_cpu_device(int threads) { return std::make_shared<CpuDevice>(threads); }
std::shared_ptr<Device> make_meta_device() { return std::make_shared<MetaDevice>(); }

}  // namespace capstan
