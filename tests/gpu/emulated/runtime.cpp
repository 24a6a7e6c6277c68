// What of CUDA's runtime the CUDA part calls, over the host: memory that only "kernels" and copies may touch, and the threads of a
// block as fibers. Streams are in streams.cpp, what they record in graphs.cpp.
#include "gpu/emulated/emulate.h"
#include "gpu/emulated/graphs.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace capstan::emulated {

Index thread_index, block_index, grid_size, block_size;

namespace {

std::recursive_mutex mutex;
std::map<char*, std::size_t> regions;  // of "device" memory
int inside = 0;                        // kernels and copies under way

/// Opens device memory while something that may touch it runs; elsewhere a touch is a crash.
struct Touching {
  std::lock_guard<std::recursive_mutex> lock{mutex};
  Touching() { if (inside++ == 0) protect(PROT_READ | PROT_WRITE); }
  ~Touching() { if (--inside == 0) protect(PROT_NONE); }
  static void protect(int how) {
    for (auto [base, bytes] : regions) mprotect(base, bytes, how);
  }
};

/// Thrown by the first barrier of a kernel that runs without fibers.
struct NeedsFibers {};

constexpr std::size_t stack_bytes = 64 << 10;
struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  Index index;
  bool done = false;
  int barrier = 0;  // how many it has passed
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
Fiber* current = nullptr;
bool direct = false;
int threads_of_block = 0;
int waiting = 0, alive = 0, generation = 0;
std::vector<std::uint64_t> slots;
std::vector<int> warp_waiting, warp_generation, warp_alive;
const std::function<void()>* body = nullptr;
std::set<const void*> with_barriers;

void yield() { swapcontext(&current->context, &scheduler); thread_index = current->index; }

void fiber_main() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

int flat_index() { return static_cast<int>(thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)); }

void warp_barrier() {
  const auto warp = static_cast<std::size_t>(flat_index() / 32);
  const int mine = warp_generation[warp];
  if (++warp_waiting[warp] == warp_alive[warp]) {
    warp_waiting[warp] = 0;
    ++warp_generation[warp];
    return;
  }
  while (warp_generation[warp] == mine) yield();
}

void run_block(const dim3& block) {
  const int n = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(fibers.size()) < n) fibers.push_back(std::make_unique<Fiber>());
  threads_of_block = alive = n, waiting = 0;
  slots.assign(static_cast<std::size_t>(n + 32), 0);
  const auto warps = static_cast<std::size_t>((n + 31) / 32);
  warp_waiting.assign(warps, 0), warp_generation.assign(warps, 0), warp_alive.assign(warps, 0);
  for (int i = 0; i < n; ++i) {
    Fiber& f = *fibers[static_cast<std::size_t>(i)];
    f.done = false;
    f.index = {static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x % block.y, static_cast<unsigned>(i) / block.x / block.y};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = stack_bytes, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    ++warp_alive[static_cast<std::size_t>(i / 32)];
  }
  // Every other pass runs backward: kernels must not live on an order.
  for (int pass = 0; alive > 0; ++pass) {
    const int before = alive, generation_before = generation;
    int moved = 0;
    for (int k = 0; k < n; ++k) {
      Fiber& f = *fibers[static_cast<std::size_t>(pass % 2 == 0 ? k : n - 1 - k)];
      if (f.done) continue;
      current = &f;
      thread_index = f.index;
      swapcontext(&scheduler, &f.context);
      ++moved;
      if (f.done) {
        --alive;
        --warp_alive[static_cast<std::size_t>(flat_index() / 32)];
        if (waiting > 0 && waiting == alive) waiting = 0, ++generation;
      }
    }
    (void)before, (void)generation_before, (void)moved;
    if (pass > 100000) throw std::logic_error("an emulated block does not end: its threads wait for each other");
  }
}

}  // namespace

int lane() { return flat_index() % 32; }

void sync_threads() {
  if (direct) throw NeedsFibers{};
  const int mine = generation;
  if (++waiting == alive) {
    waiting = 0;
    ++generation;
    return;
  }
  while (generation == mine) yield();
}

std::uint64_t exchange(std::uint64_t value, int from) {
  if (direct) throw NeedsFibers{};
  const int self = flat_index(), first = self / 32 * 32;
  slots[static_cast<std::size_t>(self)] = value;
  warp_barrier();
  const std::uint64_t result = from >= 0 && from < 32 ? slots[static_cast<std::size_t>(first + from)] : value;
  warp_barrier();
  return result;
}

void launch(const void* kernel, dim3 grid, dim3 block, const std::function<void()>& thread) {
  if (note([=] { launch(kernel, grid, block, thread); })) return;
  Touching touching;
  grid_size = {grid.x, grid.y, grid.z}, block_size = {block.x, block.y, block.z};
  body = &thread;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        if (!with_barriers.contains(kernel)) {
          try {
            direct = true;
            for (unsigned c = 0; c < block.z; ++c)
              for (unsigned b = 0; b < block.y; ++b)
                for (unsigned a = 0; a < block.x; ++a) thread_index = {a, b, c}, thread();
            direct = false;
            continue;
          } catch (const NeedsFibers&) {
            direct = false;
            with_barriers.insert(kernel);
          }
        }
        run_block(block);
      }
}

}  // namespace capstan::emulated

using capstan::emulated::Touching;

namespace {
thread_local int current_device = 0;
std::array<std::atomic<std::size_t>, 64> taken{};  // by device
std::map<void*, std::size_t> device_of;
}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) {
  Touching touching;
  if (const char* limit = std::getenv("EMULATED_GPU_BYTES"))
    if (bytes > static_cast<size_t>(std::atoll(limit))) return cudaErrorMemoryAllocation;
  bytes = (bytes + 4095) / 4096 * 4096;
  *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
  madvise(*p, bytes, MADV_HUGEPAGE);  // fewer pages to open and close around each kernel
  capstan::emulated::regions[static_cast<char*>(*p)] = bytes;
  device_of[*p] = static_cast<std::size_t>(current_device);
  taken[device_of[*p]] += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  Touching touching;
  const auto it = capstan::emulated::regions.find(static_cast<char*>(p));
  if (it == capstan::emulated::regions.end()) return p == nullptr ? cudaSuccess : cudaErrorInvalidValue;
  munmap(p, it->second);
  taken[device_of[p]] -= it->second;
  capstan::emulated::regions.erase(it);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return (*p = std::malloc(bytes)) != nullptr ? cudaSuccess : cudaErrorMemoryAllocation; }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, size_t bytes) { Touching touching; return std::memset(p, value, bytes), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { Touching touching; return std::memcpy(to, from, bytes), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = size_t{8} << 30;
  *free = *total - taken[static_cast<std::size_t>(current_device)];
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  // As the driver does it reads this at the first call.
  const char *wanted = std::getenv("EMULATED_GPU_WANTS_LOADING"), *loading = std::getenv("CUDA_MODULE_LOADING");
  if (wanted != nullptr && std::string(wanted) != (loading != nullptr ? loading : "LAZY")) return *count = 0, cudaErrorInvalidValue;
  const char* more = std::getenv("EMULATED_GPU_COUNT");
  return *count = more != nullptr ? std::atoi(more) : 1, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  std::snprintf(text, static_cast<size_t>(size), "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an emulated failure"; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 4096, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = cudaDeviceProp{};
  std::snprintf(p->name, sizeof p->name, "emulated GPU");
  const char* major = std::getenv("EMULATED_GPU_MAJOR");
  p->major = major != nullptr ? std::atoi(major) : 9, p->multiProcessorCount = 4, p->sharedMemPerBlockOptin = 227 << 10, p->totalGlobalMem = size_t{8} << 30;
  return cudaSuccess;
}
}

namespace capstan::emulated {
void touch_device_memory(const std::function<void()>& work) {
  if (note([=] { touch_device_memory(work); })) return;
  Touching touching;
  work();
}
}  // namespace capstan::emulated
