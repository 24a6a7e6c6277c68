// Rows by id, and their gradient: the ids are sorted once, so that each table row is summed by one thread in
// the order of the tokens, without atomics.
#include <kernels/cpu/backend.h>
#include <kernels/cpu/embedding.h>
#include <kernels/cpu/rows.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace capstan::kernels::cpu {

std::int64_t first_outside(std::int64_t count, const std::int32_t* ids, std::int64_t limit) {
  for (std::int64_t t = 0; t < count; ++t)
    if (ids[t] < 0 || ids[t] >= limit) return t;
  return -1;
}

template <class T>
void local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, T* mine, T* others) {
  for (std::int64_t t = 0; t < count; ++t) {
    const bool has = ids[t] >= begin && ids[t] < begin + rows;
    if (mine != nullptr) mine[t] = T(has);
    if (others != nullptr) others[t] = T(ids[t] >= 0 && !has);
    local[t] = has ? static_cast<std::int32_t>(ids[t] - begin) : -1;
  }
}

void CpuBackend::local_ids(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num,
                           void* mine, void* others) {
  if (num == Num::f64) cpu::local_ids(count, ids, begin, rows, local, static_cast<double*>(mine), static_cast<double*>(others));
  else cpu::local_ids(count, ids, begin, rows, local, static_cast<float*>(mine), static_cast<float*>(others));
}

void gather_rows(Context& ctx, std::int64_t count, std::int64_t row_bytes, const void* table, const std::int32_t* ids, void* out) {
  parallel_ranges(ctx, count, row_grain(row_bytes / 4), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      char* const to = static_cast<char*>(out) + t * row_bytes;
      if (ids[t] < 0) std::memset(to, 0, static_cast<std::size_t>(row_bytes));
      else std::memcpy(to, static_cast<const char*>(table) + ids[t] * row_bytes, static_cast<std::size_t>(row_bytes));
    }
  });
}

template <class T, class Out>
void scatter_add_rows(Context& ctx, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const T* g,
                      std::int64_t table_rows, Out* table, bool overwrite) {
  using C = Compute<T>;
  using V = Vec<C>;
  std::vector<std::uint64_t> order;  // id, then t: keys are unique
  order.reserve(static_cast<std::size_t>(count));
  for (std::int64_t t = 0; t < count; ++t)
    if (ids[t] >= 0) order.push_back(static_cast<std::uint64_t>(ids[t]) << 32 | static_cast<std::uint64_t>(t));
  std::sort(order.begin(), order.end());
  const auto named = static_cast<std::int64_t>(order.size());
  std::vector<std::int64_t> starts;
  for (std::int64_t k = 0; k < named; ++k)
    if (k == 0 || order[static_cast<std::size_t>(k)] >> 32 != order[static_cast<std::size_t>(k - 1)] >> 32) starts.push_back(k);
  const std::int64_t groups = static_cast<std::int64_t>(starts.size());
  starts.push_back(named);
  if (overwrite)
    parallel_ranges(ctx, table_rows, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
      std::memset(static_cast<void*>(table + begin * cols), 0, static_cast<std::size_t>((end - begin) * cols) * sizeof(Out));
    });
  const std::uint64_t* key = order.data();
  const std::int64_t* start = starts.data();
  parallel_ranges(ctx, groups, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      Out* to = table + static_cast<std::int64_t>(key[start[k]] >> 32) * cols;
      for_blocks<C>(cols, [=](std::int64_t i, auto m) {
        V sum(C(0));
        for (std::int64_t j = start[k]; j < start[k + 1]; ++j)
          sum = sum + V::load(g + static_cast<std::int64_t>(key[j] & 0xffffffffull) * cols + i, m);
        (V::load(to + i, m) + sum).store(to + i, m);
      });
    }
  });
}

template void local_ids(std::int64_t, const std::int32_t*, std::int64_t, std::int64_t, std::int32_t*, float*, float*);
template void local_ids(std::int64_t, const std::int32_t*, std::int64_t, std::int64_t, std::int32_t*, double*, double*);
#define INSTANTIATE(T, Out)                                                                                              \
  template void scatter_add_rows(Context&, std::int64_t, std::int64_t, const std::int32_t*, const T*, std::int64_t, Out*, bool);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(float, bf16)
INSTANTIATE(bf16, float)
INSTANTIATE(bf16, bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
