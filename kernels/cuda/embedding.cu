// Rows by id: gather, and its transpose without atomics: ids are sorted, and every id's rows are added in their order,
// within chunks of sorted positions first, then chunk after chunk.
#include <kernels/cuda/common.cuh>
#include <kernels/cuda/grid_plan.h>
#include <kernels/cuda/rows.h>

#include <cub/device/device_radix_sort.cuh>

#include <algorithm>

namespace capstan::kernels::cuda {

namespace {

__global__ void check_ids_kernel(std::int64_t count, const std::int32_t* __restrict__ ids, std::int64_t low, std::int64_t high, unsigned long long what,
                                 Context::Fault* faults) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= count || (ids[t] >= low && ids[t] < high)) return;
  if (atomicCAS(&faults->what, 0ull, what) == 0ull) {
    faults->index = static_cast<unsigned long long>(t);
    faults->value = static_cast<unsigned long long>(static_cast<long long>(ids[t]));
  }
}

/// An id that no row has, because it is nobody's or was reported by check_ids().
__device__ __forceinline__ bool outside(std::int32_t id, std::int64_t rows) { return id < 0 || id >= rows; }

template <class Word>
__global__ void gather_kernel(std::int64_t count, int words, const Word* __restrict__ table, std::int64_t table_rows, const std::int32_t* __restrict__ ids,
                              Word* __restrict__ out) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= count) return;
  const std::int32_t id = ids[t];
  if (outside(id, table_rows)) {
    for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) out[t * words + i] = Word{};
    return;
  }
  const Word* from = table + static_cast<std::int64_t>(id) * words;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) out[t * words + i] = from[i];
}

/// Ids that no row has get the key `table_rows`, behind all others.
__global__ void scatter_keys_kernel(std::int64_t count, const std::int32_t* __restrict__ ids, std::int64_t table_rows, std::uint32_t* keys, std::uint32_t* order) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= count) return;
  keys[t] = outside(ids[t], table_rows) ? static_cast<std::uint32_t>(table_rows) : static_cast<std::uint32_t>(ids[t]);
  order[t] = static_cast<std::uint32_t>(t);
}

template <class Out, class C, int Width>
__device__ __forceinline__ void add_to(Out* to, const C (&sum)[Width]) {
  C held[Width];
  if constexpr (std::is_same_v<Compute<Out>, C>) {
    load_wide<Out, Width>(to, held);
#pragma unroll
    for (int i = 0; i < Width; ++i) held[i] += sum[i];
    store_pack<Out, Width>(to, held);
  }
}

/// A block takes one chunk of sorted positions and some columns. What belongs to an id that began in an earlier chunk
/// goes to partial[chunk, 0], to one that goes on in the next chunk to partial[chunk, 1], else into the table.
template <class T, class Out, int Width>
__global__ void scatter_chunk_kernel(std::int64_t count, int cols, std::uint32_t table_rows, const std::uint32_t* __restrict__ keys,
                                     const std::uint32_t* __restrict__ order, const T* __restrict__ g, Out* __restrict__ table, Compute<T>* __restrict__ partial) {
  using C = Compute<T>;
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * Width;
  if (c >= cols) return;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * ScatterPlan::chunk, end = min(begin + ScatterPlan::chunk, count);
  bool continued = begin > 0 && keys[begin - 1] == keys[begin];
  C sum[Width] = {};
  // Four rows are loaded ahead: one row's sum need not wait for its load.
  constexpr int ahead = 4;
  for (std::int64_t k = begin; k < end; k += ahead) {
    Pack<T, Width> rows[ahead];
#pragma unroll
    for (int a = 0; a < ahead; ++a)
      if (k + a < end) rows[a] = load_pack<T, Width>(g + static_cast<std::int64_t>(order[k + a]) * cols + c);
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      if (k + a >= end) break;
#pragma unroll
      for (int i = 0; i < Width; ++i) sum[i] += widen(rows[a].v[i]);
      const std::uint32_t id = keys[k + a];
      if (id >= table_rows) return;  // and so are all behind it
      const bool last = k + a + 1 == end;
      const bool goes_on = k + a + 1 < count && keys[k + a + 1] == id;
      if (goes_on && !last) continue;
      if (continued || goes_on) {
        C* to = partial + (static_cast<std::int64_t>(blockIdx.x) * 2 + (continued ? 0 : 1)) * cols + c;
#pragma unroll
        for (int i = 0; i < Width; ++i) to[i] = sum[i];
      } else {
        add_to<Out, C, Width>(table + static_cast<std::int64_t>(id) * cols + c, sum);
      }
      continued = false;
#pragma unroll
      for (int i = 0; i < Width; ++i) sum[i] = C(0);
    }
  }
}

/// Ids whose rows reach over chunks: the chunk in which they begin adds the later chunks' sums in order.
template <class T, class Out, int Width>
__global__ void scatter_join_kernel(std::int64_t count, int cols, std::uint32_t table_rows, const std::uint32_t* __restrict__ keys,
                                    Out* __restrict__ table, const Compute<T>* __restrict__ partial) {
  using C = Compute<T>;
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * Width;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * ScatterPlan::chunk, end = begin + ScatterPlan::chunk;
  if (c >= cols || end >= count) return;
  const std::uint32_t id = keys[end - 1];
  const bool began_before = begin > 0 && keys[begin - 1] == id;
  if (keys[end] != id || began_before || id >= table_rows) return;
  C sum[Width], more[Width];
  load_wide<C, Width>(partial + (static_cast<std::int64_t>(blockIdx.x) * 2 + 1) * cols + c, sum);
  for (std::int64_t chunk = blockIdx.x + 1; chunk * ScatterPlan::chunk < count && keys[chunk * ScatterPlan::chunk] == id; ++chunk) {
    load_wide<C, Width>(partial + chunk * 2 * cols + c, more);
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += more[i];
  }
  add_to<Out, C, Width>(table + static_cast<std::int64_t>(id) * cols + c, sum);
}

template <class T>
__global__ void store_pages_kernel(std::int64_t tokens, int heads, int size, int page, const T* __restrict__ from, std::int64_t row_stride,
                                   std::int64_t head_stride, const std::int64_t* __restrict__ rows, T* __restrict__ pages) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t width = static_cast<std::int64_t>(heads) * size, t = i / width;
  if (t >= tokens) return;
  const int h = static_cast<int>(i % width) / size, j = static_cast<int>(i % size);
  const std::int64_t row = rows[t];
  if (row < 0) return;
  pages[((row / page * heads + h) * page + row % page) * size + j] = from[t * row_stride + h * head_stride + j];
}

}  // namespace

void check_ids(Context& ctx, const char* what, std::int64_t count, const std::int32_t* ids, std::int64_t low, std::int64_t high) {
  if (count == 0) return;
  launch_block(ctx, "check_ids", check_ids_kernel, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, count, ids, low, high, ctx.fault_number(what),
               ctx.faults());
}

void gather_rows(Context& ctx, std::int64_t count, std::int64_t row_bytes, const void* table, std::int64_t table_rows, const std::int32_t* ids, void* out) {
  if (count == 0 || row_bytes == 0) return;
  const auto run = [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    const std::int64_t words = row_bytes / static_cast<std::int64_t>(sizeof(Word));
    const auto [threads, rows] = gather_block(words);
    launch_block(ctx, "gather_rows", gather_kernel<Word>, dim3(static_cast<unsigned>(ceil_div(count, rows))), dim3(threads, rows), 0, count, static_cast<int>(words),
                 static_cast<const Word*>(table), table_rows, ids, static_cast<Word*>(out));
  };
  if (row_bytes % 16 == 0 && all_on_16(table, out)) run(static_cast<uint4*>(nullptr));
  else if (row_bytes % 4 == 0) run(static_cast<std::uint32_t*>(nullptr));
  else if (row_bytes % 2 == 0) run(static_cast<std::uint16_t*>(nullptr));
  else run(static_cast<std::uint8_t*>(nullptr));
}

void scatter_add_rows(Context& ctx, Num num, std::int64_t count, std::int64_t cols, const std::int32_t* ids, const void* g,
                      std::int64_t table_rows, Num table_num, void* table, bool overwrite) {
  constexpr const char* name = "scatter_add_rows";
  if (overwrite && table_rows * cols > 0)
    check(cudaMemsetAsync(table, 0, static_cast<std::size_t>(table_rows * cols * bytes_of(table_num)), ctx.stream()), name);
  if (count == 0 || cols == 0 || table_rows == 0) return;
  int bits = 1;
  while (bits < 32 && (std::int64_t{1} << bits) <= table_rows) ++bits;
  std::size_t sort_bytes = 0;
  const auto n = static_cast<std::int32_t>(count);
  const auto rows = static_cast<std::uint32_t>(table_rows);
  std::uint32_t* none = nullptr;
  check(cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, none, none, none, none, n, 0, bits, ctx.stream()), name);
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    const ScatterPlan plan = plan_scatter(count, cols, sizeof(C), static_cast<std::int64_t>(sort_bytes));
    auto* base = static_cast<unsigned char*>(ctx.scratch(plan.workspace));
    auto* keys_in = reinterpret_cast<std::uint32_t*>(base + plan.ids);
    auto* keys = reinterpret_cast<std::uint32_t*>(base + plan.keys);
    auto* order_in = reinterpret_cast<std::uint32_t*>(base + plan.order);
    auto* order = order_in + count;
    auto* partial = reinterpret_cast<C*>(base + plan.partial);
    launch_block(ctx, name, scatter_keys_kernel, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, count, ids, table_rows, keys_in, order_in);
    check(cub::DeviceRadixSort::SortPairs(base + plan.sort, sort_bytes, keys_in, keys, order_in, order, n, 0, bits, ctx.stream()), name);
    const auto run = [&]<class Out, int Width>() {
      const std::int64_t packs = ceil_div(cols, Width);
      const unsigned threads = scatter_threads(packs);
      const Blocks blocks = checked(name, scatter_blocks(plan.chunks, packs));
      const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
      launch_block(ctx, name, scatter_chunk_kernel<T, Out, Width>, grid, dim3(threads), 0, count, static_cast<int>(cols), rows, keys, order, static_cast<const T*>(g),
                   static_cast<Out*>(table), partial);
      launch_block(ctx, name, scatter_join_kernel<T, Out, Width>, grid, dim3(threads), 0, count, static_cast<int>(cols), rows, keys, static_cast<Out*>(table), partial);
    };
    const auto by_width = [&]<class Out>() {
      constexpr int width = 16 / static_cast<int>(sizeof(T));
      if (cols % 8 == 0 && all_on_16(g, table)) run.template operator()<Out, width>();
      else run.template operator()<Out, 1>();
    };
    if constexpr (std::is_same_v<T, double>) by_width.template operator()<double>();
    else if (table_num == Num::bf16) by_width.template operator()<bf16>();
    else by_width.template operator()<float>();
  });
}

void store_pages(Context& ctx, Num num, std::int64_t tokens, std::int64_t heads, std::int64_t size, std::int64_t page, const void* from,
                 std::int64_t row_stride, std::int64_t head_stride, const std::int64_t* rows, void* pages) {
  if (tokens * heads * size == 0) return;
  visit(num, [&]<class T>() {
    launch_block(ctx, "store_pages", store_pages_kernel<T>, dim3(static_cast<unsigned>(ceil_div(tokens * heads * size, 256))), dim3(256), 0, tokens,
                 static_cast<int>(heads), static_cast<int>(size), static_cast<int>(page), static_cast<const T*>(from), row_stride, head_stride, rows,
                 static_cast<T*>(pages));
  });
}

}  // namespace capstan::kernels::cuda
