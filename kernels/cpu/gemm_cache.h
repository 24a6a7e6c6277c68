// defines: GemmCache: oneDNN matmul primitives by shape. Internal to kernels/cpu.
#pragma once
#include <kernels/cpu/gemm.h>

#include <oneapi/dnnl/dnnl.hpp>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>

namespace capstan::kernels::cpu {

struct GemmCache {
  using Key = std::tuple<int, int, int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  struct Entry {
    dnnl::matmul primitive;
    dnnl::reorder pack;  ///< of B, when `packed`
    dnnl::memory::desc a, b, c, bias;
    dnnl::memory::desc primitive_b;  ///< B as the primitive reads it
    bool packed = false;
  };
  struct Free { void operator()(void* p) const { std::free(p); } };
  /// Memory that is kept from call to call and grows.
  struct Room {
    std::unique_ptr<void, Free> data;
    std::size_t bytes = 0;
    void* of(std::size_t need) {
      if (bytes < need) {
        data.reset(std::aligned_alloc(64, (need + 4095) / 4096 * 4096));
        bytes = data ? need : 0;
        if (!data) throw std::bad_alloc();
      }
      return data.get();
    }
  };
  Room packed;              ///< one B at a time
  Room wide_a, wide_b, wide_c;  ///< bf16 operands as f32, where products run in f32
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, Entry> entries;
  std::mutex mutex;
  bool probed = false, rows_depend = false;
  int bf16 = -1;  ///< not known yet
};

}  // namespace capstan::kernels::cpu
