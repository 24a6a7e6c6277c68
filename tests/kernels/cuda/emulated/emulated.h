// defines: a CPU that runs CUDA kernels one block after another: threads are fibers that meet at barriers and at what a
// warp does together. Slow and without races, but it runs the very lines that a GPU runs: indices, tails, shuffles,
// sums. The folder of this header stands before all others, so that its headers take the place of CUDA's; a test then
// includes a kernel's .cu file. No part of CUDA is needed.
#pragma once
#include <capstan/kernels/bf16.h>

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

struct uint3 { unsigned x = 0, y = 0, z = 0; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_in = 1, unsigned y_in = 1, unsigned z_in = 1) : x(x_in), y(y_in), z(z_in) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) { return std::memset(to, value, bytes), cudaSuccess; }

inline cudaError_t cudaMemset2DAsync(void* to, std::size_t pitch, int value, std::size_t width, std::size_t height, cudaStream_t) {
  for (std::size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(to) + i * pitch, value, width);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class T> cudaError_t cudaMalloc(T** p, std::size_t bytes) { return *p = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), cudaSuccess; }
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int value, std::size_t bytes) { return std::memset(p, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) { return std::memcpy(to, from, bytes), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
// What is launched has run when the launch returns, so an event is when it is recorded.
using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = new std::chrono::steady_clock::time_point, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) { return *e = std::chrono::steady_clock::now(), cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) { return *ms = std::chrono::duration<float, std::milli>(*b - *a).count(), cudaSuccess; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

namespace emulated {

/// One block. Fibers run round and round; a barrier opens when all threads that are not done stand at it, a warp's
/// meeting when all its threads do.
class Block {
 public:
  Block(dim3 size, std::function<void()> body) : body_(std::move(body)), threads_(size.x * size.y * size.z) {
    for (unsigned i = 0; i < threads_.size(); ++i) threads_[i].index.x = i % size.x, threads_[i].index.y = i / size.x % size.y, threads_[i].index.z = i / size.x / size.y;
  }
  void run() {
    current() = this;
    for (Thread& t : threads_) {
      t.stack.reset(new char[stack_bytes]);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = stack_bytes, t.context.uc_link = &main_;
      makecontext(&t.context, &Block::start, 0);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (running_ = 0; running_ < threads_.size(); ++running_)
        if (threads_[running_].state == ready) {
          busy = true, threadIdx = threads_[running_].index;
          swapcontext(&main_, &threads_[running_].context);
          if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        }
      busy = open() || busy;
    }
    for (const Thread& t : threads_)
      if (t.state != done) throw std::runtime_error("emulated block: threads wait for one another for ever");
    current() = nullptr;
  }
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }
  void barrier() { wait(at_barrier); }
  void meet() { wait(at_meeting); }
  unsigned lane() const { return static_cast<unsigned>(running_ % 32); }
  /// What each lane of this warp brings.
  template <class T>
  std::array<T, 32> gather(const T& mine) {
    static_assert(sizeof(T) <= sizeof(Thread::value));
    const std::size_t warp = running_ / 32 * 32;
    std::memcpy(threads_[running_].value, &mine, sizeof(T));
    meet();
    std::array<T, 32> all{};
    for (std::size_t i = 0; i < 32 && warp + i < threads_.size(); ++i) std::memcpy(&all[i], threads_[warp + i].value, sizeof(T));
    meet();  // nobody brings the next value before all have read this one
    return all;
  }

 private:
  enum State { ready, at_barrier, at_meeting, done };
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3 index;
    State state = ready;
    alignas(16) unsigned char value[32];
  };
  static constexpr std::size_t stack_bytes = 128 * 1024;

  static void start() {
    Block* b = current();
    try {
      b->body_();
    } catch (...) {
      b->error_ = std::current_exception();
    }
    b->threads_[b->running_].state = done;
  }
  void wait(State state) {
    threads_[running_].state = state;
    swapcontext(&threads_[running_].context, &main_);
  }
  bool open() {
    bool any = false, all_wait = true, barrier = false;
    for (std::size_t w = 0; w < threads_.size(); w += 32) {
      const std::size_t end = std::min(threads_.size(), w + 32);
      bool all = true;
      for (std::size_t i = w; i < end; ++i) all = all && threads_[i].state == at_meeting;
      if (!all) continue;
      for (std::size_t i = w; i < end; ++i) threads_[i].state = ready;
      any = true;
    }
    for (const Thread& t : threads_) all_wait = all_wait && (t.state == at_barrier || t.state == done), barrier = barrier || t.state == at_barrier;
    if (!all_wait || !barrier) return any;
    for (Thread& t : threads_)
      if (t.state == at_barrier) t.state = ready;
    return true;
  }

  std::function<void()> body_;
  std::vector<Thread> threads_;
  ucontext_t main_;
  std::size_t running_ = 0;
  std::exception_ptr error_;
};

inline std::vector<std::array<unsigned char, 128>>& shared_room() {
  static std::vector<std::array<unsigned char, 128>> room;
  return room;
}
/// 128-byte aligned.
inline unsigned char* shared() {
  auto* p = reinterpret_cast<unsigned char*>(shared_room().data());
  return p + (128 - reinterpret_cast<std::uintptr_t>(p) % 128) % 128;
}
inline void run(dim3 grid, dim3 block, std::int64_t shared_bytes, const std::function<void()>& body) {
  shared_room().resize(static_cast<std::size_t>(shared_bytes) / 128 + 2);
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(static_cast<void*>(shared_room().data()), 0xff, shared_room().size() * 128);  // not a number
        blockIdx.x = x, blockIdx.y = y, blockIdx.z = z;
        Block(block, body).run();
      }
}
inline unsigned lane() { return Block::current()->lane(); }
template <class T> std::array<T, 32> gather(const T& mine) { return Block::current()->gather(mine); }
inline float from_bits(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }

}  // namespace emulated

inline void __syncthreads() { emulated::Block::current()->barrier(); }
inline void __syncwarp() { emulated::Block::current()->meet(); }
template <class T> T __shfl_xor_sync(unsigned, T x, int step) { return emulated::gather(x)[emulated::lane() ^ static_cast<unsigned>(step)]; }
template <class T> T __shfl_up_sync(unsigned, T x, int step) { return emulated::gather(x)[emulated::lane() >= static_cast<unsigned>(step) ? emulated::lane() - static_cast<unsigned>(step) : emulated::lane()]; }
template <class T> T __shfl_sync(unsigned, T x, int from) { return emulated::gather(x)[static_cast<unsigned>(from) % 32]; }
inline unsigned __ballot_sync(unsigned, bool x) {
  unsigned bits = 0;
  const auto all = emulated::gather(x);
  for (unsigned i = 0; i < 32; ++i) bits |= all[i] ? 1u << i : 0u;
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected, unsigned long long value) {
  const unsigned long long old = *at;
  if (old == expected) *at = value;
  return old;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned old = *at;
  if (value > old) *at = value;
  return old;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned u) { return emulated::from_bits(u); }
inline float __int_as_float(int i) { return emulated::from_bits(static_cast<unsigned>(i)); }
inline double __longlong_as_double(long long i) { double d; std::memcpy(&d, &i, 8); return d; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <class T> T __ldcs(const T* p) { return *p; }
using std::max;
using std::min;

struct __nv_bfloat16 { std::uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return {capstan::kernels::bf16(f).bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
