// defines: GemmCache: oneDNN matmul primitives by shape. Internal to kernels/cpu.
#pragma once
#include <kernels/cpu/gemm.h>

#include <oneapi/dnnl/dnnl.hpp>

#include <map>
#include <mutex>
#include <tuple>

namespace capstan::kernels::cpu {

struct GemmCache {
  using Key = std::tuple<int, int, int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                         std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  struct Entry {
    dnnl::matmul primitive;
    dnnl::memory::desc a, b, c, bias, scratchpad;
  };
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, Entry> entries;
  std::mutex mutex;
  bool probed = false, rows_depend = false;
};

}  // namespace capstan::kernels::cpu
