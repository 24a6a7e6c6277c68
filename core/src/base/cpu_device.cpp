// The CPU device: a caching pool over large mappings, because fresh pages are the slowest memory there is
// (docs/maintainers/performance.md), and the meta device, which only counts.
#include <capstan/device.h>
#include <capstan/error.h>
#include <kernels/cpu/context.h>

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace capstan {

namespace {

constexpr std::int64_t alignment = 64;
constexpr std::int64_t huge_page = std::int64_t{2} << 20;
constexpr std::int64_t region_bytes = std::int64_t{64} << 20;

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

std::int64_t usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return std::max<long>(1, sysconf(_SC_NPROCESSORS_ONLN));
  return std::max(1, CPU_COUNT(&set));
}

/// Best fit over mapped regions, with splitting and coalescing. Nothing goes back to the system before
/// the end, so a training step touches no fresh page after the first.
class Pool {
 public:
  ~Pool() {
    for (auto [base, size] : regions_) munmap(base, static_cast<std::size_t>(size));
  }

  void* take(std::int64_t bytes) {
    auto fit = free_.lower_bound({bytes, nullptr});
    if (fit == free_.end()) {
      if (!grow(bytes)) return nullptr;
      fit = free_.lower_bound({bytes, nullptr});
    }
    auto [size, at] = *fit;
    free_.erase(fit);
    Chunk& chunk = chunks_.at(at);
    chunk.free = false;
    if (size - bytes >= alignment) {
      char* rest = at + bytes;
      chunks_[rest] = {size - bytes, true, chunk.region};
      chunk.size = bytes;
      free_.insert({size - bytes, rest});
    }
    return at;
  }

  void give(void* data) {
    auto it = chunks_.find(static_cast<char*>(data));
    it->second.free = true;
    auto next = std::next(it);
    if (next != chunks_.end() && next->second.free && next->second.region == it->second.region) {
      free_.erase({next->second.size, next->first});
      it->second.size += next->second.size;
      chunks_.erase(next);
    }
    if (it != chunks_.begin()) {
      auto before = std::prev(it);
      if (before->second.free && before->second.region == it->second.region) {
        free_.erase({before->second.size, before->first});
        before->second.size += it->second.size;
        chunks_.erase(it);
        it = before;
      }
    }
    free_.insert({it->second.size, it->first});
  }

  std::int64_t reserved() const { return reserved_; }

 private:
  struct Chunk { std::int64_t size; bool free; int region; };

  bool grow(std::int64_t bytes) {
    const std::int64_t size = round_up(std::max(bytes, region_bytes), huge_page);
    // Over-map and trim, so that the region starts on a huge page.
    void* raw = mmap(nullptr, static_cast<std::size_t>(size + huge_page), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return false;
    char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<std::int64_t>(raw), huge_page));
    const std::int64_t head = base - static_cast<char*>(raw);
    if (head > 0) munmap(raw, static_cast<std::size_t>(head));
    if (huge_page - head > 0) munmap(base + size, static_cast<std::size_t>(huge_page - head));
    madvise(base, static_cast<std::size_t>(size), MADV_HUGEPAGE);
    const int region = static_cast<int>(regions_.size());
    regions_.push_back({base, size});
    chunks_[base] = {size, true, region};
    free_.insert({size, base});
    reserved_ += size;
    return true;
  }

  std::map<char*, Chunk> chunks_;
  std::set<std::pair<std::int64_t, char*>> free_;
  std::vector<std::pair<char*, std::int64_t>> regions_;
  std::int64_t reserved_ = 0;
};

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int threads)
      : context_(threads > 0 ? threads : static_cast<int>(usable_cores())),
        limit_(sysconf(_SC_PHYS_PAGES) * static_cast<std::int64_t>(sysconf(_SC_PAGESIZE))) {}
  DeviceKind kind() const override { return DeviceKind::cpu; }
  kernels::cpu::Context& cpu() override { return context_; }

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
  Pool pool_;
  kernels::cpu::Context context_;
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

std::shared_ptr<Device> make_cpu_device(int threads) { return std::make_shared<CpuDevice>(threads); }
std::shared_ptr<Device> make_meta_device() { return std::make_shared<MetaDevice>(); }

}  // namespace capstan
