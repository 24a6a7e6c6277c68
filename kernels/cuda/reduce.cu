// Sums and maxima. Orders are fixed by the shape alone: chunks of a length that plan.h derives from it, a fixed tree in each,
// then the chunks in order. No atomics.
#include <kernels/cuda/grid_plan.h>
#include <kernels/cuda/lane.cuh>
#include <kernels/cuda/queue.h>
#include <kernels/cuda/reduce.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

constexpr int threads = 256;

Launch flat_launch(std::int64_t items) {
  Launch l;
  l.grid_x = static_cast<unsigned>(grid_for(items, threads).blocks);
  l.block = threads;
  return l;
}

/// The sum over a block, in thread 0: lanes of a warp by halves, then the warps in order.
template <class C>
__device__ C block_sum(C x) {
  __shared__ C warps[threads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  C sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < threads / 32; ++w) sum += warps[w];
  return sum;
}

/// Rows (inner = 1): one block sums elements [chunk * length, ...) of row o.
template <class T, class Out>
__global__ void sum_rows_kernel(std::int64_t n, std::int64_t chunks, std::int64_t length, const T* a, Compute<T> factor, Out* out) {
  using C = Compute<T>;
  const std::int64_t o = blockIdx.x / chunks, chunk = blockIdx.x - o * chunks, begin = chunk * length, end = ::min(n, begin + length);
  const T* row = a + o * n;
  C sum = 0;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += threads) sum += static_cast<C>(row[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = Out(sum * factor);
}

/// Short rows: one warp a row.
template <class T, class Out>
__global__ void sum_short_rows_kernel(std::int64_t outer, std::int64_t n, const T* a, Compute<T> factor, Out* out) {
  using C = Compute<T>;
  const std::int64_t o = static_cast<std::int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (o >= outer) return;
  C sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < n; i += 32) sum += static_cast<C>(a[o * n + i]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) out[o] = Out(sum * factor);
}

/// Columns: a block is 64 columns by 4 rows of threads; rows `stride` apart. Each thread sums every fourth row of its
/// chunk, then the four in order.
template <class T, class Out>
__global__ void sum_columns_kernel(std::int64_t n, std::int64_t inner, std::int64_t stride, std::int64_t outer_stride, std::int64_t chunks,
                                   std::int64_t length, const T* a, Compute<T> factor, Out* out, bool accumulate) {
  using C = Compute<T>;
  __shared__ C part[4][64];
  const int x = threadIdx.x % 64, y = threadIdx.x / 64;
  const std::int64_t o = blockIdx.x / chunks, chunk = blockIdx.x - o * chunks, begin = chunk * length, end = ::min(n, begin + length);
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * 64; first < inner; first += static_cast<std::int64_t>(gridDim.y) * 64) {
    const std::int64_t col = first + x;
    C sum = 0;
    if (col < inner)
      for (std::int64_t i = begin + y; i < end; i += 4) sum += static_cast<C>(a[o * outer_stride + i * stride + col]);
    part[y][x] = sum;
    __syncthreads();
    if (y == 0 && col < inner) {
      const C total = (((part[0][x] + part[1][x]) + part[2][x]) + part[3][x]) * factor;
      Out& to = out[static_cast<std::int64_t>(blockIdx.x) * inner + col];
      to = accumulate ? Out(static_cast<C>(to) + total) : Out(total);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void spread_kernel(std::int64_t total, std::int64_t n, std::int64_t inner, const T* g, Compute<T> factor, T* out) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += static_cast<std::int64_t>(gridDim.x) * threads) {
    const std::int64_t o = i / (n * inner), rest = i % inner;
    out[i] = T(static_cast<Compute<T>>(g[o * inner + rest]) * factor);
  }
}

template <class T>
__global__ void max_kernel(std::int64_t total, std::int64_t n, std::int64_t inner, const T* a, T* out) {
  using C = Compute<T>;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= total) return;
  const std::int64_t o = i / inner;
  const T* at = a + o * n * inner + (i - o * inner);
  C best = static_cast<C>(at[0]);
  for (std::int64_t j = 1; j < n; ++j) {
    const C x = static_cast<C>(at[j * inner]);
    if (x > best || x != x) best = x;
    if (best != best) break;
  }
  out[i] = T(best);
}

template <class T>
__global__ void max_backward_kernel(std::int64_t total, std::int64_t n, std::int64_t inner, const T* a, const T* m, const T* g, T* da) {
  using C = Compute<T>;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= total) return;
  const std::int64_t o = i / inner, base = o * n * inner + (i - o * inner);
  const C most = static_cast<C>(m[i]);
  bool found = false;
  for (std::int64_t j = 0; j < n; ++j) {
    const bool here = !found && static_cast<C>(a[base + j * inner]) == most;
    da[base + j * inner] = here ? g[i] : T(C(0));
    found = found || here;
  }
}


template <class T>
__global__ void squares_kernel(std::int64_t n, const T* x, double* partial) {
  const std::int64_t length = (n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * length, end = ::min(n, begin + length);
  double sum = 0;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += threads) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// The sum of `count` numbers in order of their place in a fixed tree; one block.
__global__ void total_kernel(std::int64_t count, const double* partial, double* out) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += threads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

/// One thread: the pieces' sums in order, as the host adds them.
__global__ void gate_part_kernel(std::int64_t pieces, const double* sums, std::int64_t count, const double* losses, GatePart* part) {
  double total = 0, loss = 0;
  for (std::int64_t i = 0; i < pieces; ++i) total += sums[i];
  for (std::int64_t i = 0; i < count; ++i) loss += losses[i];
  part->squares = total, part->losses = loss;
}

/// One thread: the ranks' sums in order, as the host adds them.
__global__ void gate_kernel(std::int64_t ranks, const GatePart* parts, double clip, Gate* gate) {
  double total = 0, loss = 0;
  for (std::int64_t r = 0; r < ranks; ++r) total += parts[r].squares, loss += parts[r].losses;
  const double norm = ::sqrt(total);
  gate->norm = norm;
  gate->factor = clip > 0 && norm > clip ? clip / norm : 1.0;
  if (!isfinite(norm) || !isfinite(loss)) gate->shut = 1;
}

template <class T>
__global__ void nonfinite_kernel(std::int64_t n, const T* x, int* found) {
  bool bad = false;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < n; i += static_cast<std::int64_t>(gridDim.x) * threads)
    bad |= !isfinite(x[i]);
  if (bad) *found = 1;  // every writer writes the same
}

template <class T>
__global__ void scale_by_norm_kernel(std::int64_t n, T* x, const double* squares, double least) {
  const T scale = static_cast<T>(1 / ::fmax(::sqrt(*squares), least));
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < n; i += static_cast<std::int64_t>(gridDim.x) * threads) x[i] *= scale;
}

template <class T>
__global__ void check_one_kernel(const T* x, unsigned long long number, Context::Fault* faults) {
  const double v = static_cast<double>(static_cast<Compute<T>>(*x));
  if (v != 1.0 && atomicCAS(&faults->what, 0ull, number) == 0ull) {
    faults->index = 0;
    faults->value = static_cast<unsigned long long>(static_cast<long long>(v));
  }
}

template <class T, class Out>
void sum_columns(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, std::int64_t stride, std::int64_t outer_stride, const T* a,
                 Compute<T> factor, Out* out, bool accumulate) {
  using C = Compute<T>;
  const ReducePlan plan = reduce_plan(outer, n, inner);
  const auto grid = [&](std::int64_t rows) {
    const Blocks blocks = checked("a sum of columns", column_blocks(rows, inner));
    Launch l;
    l.grid_x = static_cast<unsigned>(blocks.x), l.grid_y = static_cast<unsigned>(blocks.y), l.block = threads;
    return l;
  };
  if (plan.chunks == 1) {
    launch(ctx, grid(outer), "sum of columns", sum_columns_kernel<T, Out>, n, inner, stride, outer_stride, std::int64_t{1}, plan.length, a, factor, out, accumulate);
    return;
  }
  C* partial = static_cast<C*>(ctx.scratch(outer * plan.chunks * inner * static_cast<std::int64_t>(sizeof(C))));
  launch(ctx, grid(outer * plan.chunks), "sum of columns", sum_columns_kernel<T, C>, n, inner, stride, outer_stride, plan.chunks, plan.length, a, C(1), partial, false);
  launch(ctx, grid(outer), "sum of columns' chunks", sum_columns_kernel<C, Out>, plan.chunks, inner, inner, plan.chunks * inner, std::int64_t{1}, plan.chunks,
         static_cast<const C*>(partial), factor, out, accumulate);
}

template <class T, class Out>
void sum_rows(Context& ctx, std::int64_t outer, std::int64_t n, const T* a, Compute<T> factor, Out* out) {
  using C = Compute<T>;
  Launch l;
  l.block = threads;
  static_assert(threads / 32 == 8, "short_row_blocks() has a warp for each row");
  if (rows_are_short(outer, n)) {
    l.grid_x = static_cast<unsigned>(checked("a sum of rows", short_row_blocks(outer)).x);
    launch(ctx, l, "sum of rows", sum_short_rows_kernel<T, Out>, outer, n, a, factor, out);
    return;
  }
  const ReducePlan plan = reduce_plan(outer, n, 1);
  l.grid_x = static_cast<unsigned>(outer * plan.chunks);
  if (plan.chunks == 1) {
    launch(ctx, l, "sum of rows", sum_rows_kernel<T, Out>, n, std::int64_t{1}, plan.length, a, factor, out);
    return;
  }
  C* partial = static_cast<C*>(ctx.scratch(outer * plan.chunks * static_cast<std::int64_t>(sizeof(C))));
  launch(ctx, l, "sum of rows", sum_rows_kernel<T, C>, n, plan.chunks, plan.length, a, C(1), partial);
  l.grid_x = static_cast<unsigned>(outer);
  launch(ctx, l, "sum of rows' chunks", sum_rows_kernel<C, Out>, plan.chunks, std::int64_t{1}, plan.chunks, static_cast<const C*>(partial), factor, out);
}

/// Sum of squares of one piece into *out.
void squares(Context& ctx, const Piece& piece, double* partial, double* out) {
  Launch l;
  const std::int64_t blocks = square_blocks(piece.count);
  l.grid_x = static_cast<unsigned>(blocks), l.block = threads;
  if (piece.num == Num::f64) launch(ctx, l, "sum of squares", squares_kernel<double>, piece.count, static_cast<const double*>(piece.data), partial);
  else if (piece.num == Num::f32) launch(ctx, l, "sum of squares", squares_kernel<float>, piece.count, static_cast<const float*>(piece.data), partial);
  else throw std::invalid_argument("[cuda sum_of_squares] expected f32 or f64");
  l.grid_x = 1;
  launch(ctx, l, "sum of squares", total_kernel, blocks, static_cast<const double*>(partial), out);
}

}  // namespace

void sum_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, double factor, Num out_num, void* out) {
  if (outer == 0 || inner == 0) return;
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    const auto f = static_cast<C>(factor);
    const auto run = [&]<class Out>(Out* to) {
      if (inner == 1) sum_rows<T, Out>(ctx, outer, n, static_cast<const T*>(a), f, to);
      else sum_columns<T, Out>(ctx, outer, n, inner, inner, n * inner, static_cast<const T*>(a), f, to, false);
    };
    if (out_num == num) run(static_cast<T*>(out));
    else run(static_cast<C*>(out));
  });
}

void spread_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* g, double factor, void* out) {
  const std::int64_t total = outer * n * inner;
  visit(num, [&]<class T>() {
    launch(ctx, flat_launch(total), "spread", spread_kernel<T>, total, n, inner, static_cast<const T*>(g), static_cast<Compute<T>>(factor), static_cast<T*>(out));
  });
}

void max_middle(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, void* out) {
  visit(num, [&]<class T>() {
    launch(ctx, flat_launch(outer * inner), "max", max_kernel<T>, outer * inner, n, inner, static_cast<const T*>(a), static_cast<T*>(out));
  });
}

void max_middle_backward(Context& ctx, Num num, std::int64_t outer, std::int64_t n, std::int64_t inner, const void* a, const void* m,
                         const void* g, void* da) {
  visit(num, [&]<class T>() {
    launch(ctx, flat_launch(outer * inner), "max dx", max_backward_kernel<T>, outer * inner, n, inner, static_cast<const T*>(a), static_cast<const T*>(m),
           static_cast<const T*>(g), static_cast<T*>(da));
  });
}

void column_sum(Context& ctx, Num num, const void* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, Num to_num, void* to, bool accumulate) {
  if (cols == 0) return;
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    const auto* a = static_cast<const T*>(from);
    if (to_num == num) sum_columns<T, T>(ctx, 1, rows, cols, stride, 0, a, C(1), static_cast<T*>(to), accumulate);
    else sum_columns<T, C>(ctx, 1, rows, cols, stride, 0, a, C(1), static_cast<C*>(to), accumulate);
  });
}

double sum_of_squares(Context& ctx, std::span<const Piece> pieces) {
  if (pieces.empty()) return 0;
  auto* room = static_cast<double*>(ctx.scratch((most_square_blocks + static_cast<std::int64_t>(pieces.size())) * static_cast<std::int64_t>(sizeof(double))));
  for (std::size_t i = 0; i < pieces.size(); ++i) squares(ctx, pieces[i], room, room + most_square_blocks + i);
  std::vector<double> sums(pieces.size());
  check(cudaMemcpyAsync(sums.data(), room + most_square_blocks, sums.size() * sizeof(double), cudaMemcpyDeviceToHost, ctx.stream()), "reading sums");
  check(cudaStreamSynchronize(ctx.stream()), "summing squares");
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

void measure(Context& ctx, std::span<const Piece> gradient, const double* losses, std::int64_t count, GatePart* part) {
  const auto pieces = static_cast<std::int64_t>(gradient.size());
  auto* room = static_cast<double*>(ctx.scratch((most_square_blocks + pieces) * static_cast<std::int64_t>(sizeof(double))));
  for (std::size_t i = 0; i < gradient.size(); ++i) squares(ctx, gradient[i], room, room + most_square_blocks + i);
  launch(ctx, Launch{}, "norm of the gradient", gate_part_kernel, pieces, static_cast<const double*>(room + most_square_blocks), count, losses, part);
}

void decide(Context& ctx, const GatePart* parts, std::int64_t ranks, double clip, Gate* gate) {
  launch(ctx, Launch{}, "gate of the gradient", gate_kernel, ranks, parts, clip, gate);
}

std::int64_t first_nonfinite(Context& ctx, std::span<const Piece> pieces) {
  if (pieces.empty()) return -1;
  auto* found = static_cast<int*>(ctx.scratch(static_cast<std::int64_t>(pieces.size() * sizeof(int))));
  check(cudaMemsetAsync(found, 0, pieces.size() * sizeof(int), ctx.stream()), "clearing memory");
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    Launch l = flat_launch(p.count);
    l.grid_x = std::min(l.grid_x, 4096u);
    if (p.num == Num::f64) launch(ctx, l, "search for what is not finite", nonfinite_kernel<double>, p.count, static_cast<const double*>(p.data), found + i);
    else launch(ctx, l, "search for what is not finite", nonfinite_kernel<float>, p.count, static_cast<const float*>(p.data), found + i);
  }
  std::vector<int> host(pieces.size());
  check(cudaMemcpyAsync(host.data(), found, host.size() * sizeof(int), cudaMemcpyDeviceToHost, ctx.stream()), "reading flags");
  check(cudaStreamSynchronize(ctx.stream()), "searching for what is not finite");
  const auto at = std::find(host.begin(), host.end(), 1);
  return at == host.end() ? -1 : at - host.begin();
}

void normalize(Context& ctx, Num num, std::int64_t n, void* x, double least) {
  if (n == 0) return;
  auto* room = static_cast<double*>(ctx.scratch((most_square_blocks + 1) * static_cast<std::int64_t>(sizeof(double))));
  squares(ctx, {num, x, n}, room, room + most_square_blocks);
  if (num == Num::f64) launch(ctx, flat_launch(n), "normalize", scale_by_norm_kernel<double>, n, static_cast<double*>(x), static_cast<const double*>(room + most_square_blocks), least);
  else launch(ctx, flat_launch(n), "normalize", scale_by_norm_kernel<float>, n, static_cast<float*>(x), static_cast<const double*>(room + most_square_blocks), least);
}

void check_one(Context& ctx, const char* what, Num num, const void* x) {
  Launch l;
  visit(num, [&]<class T>() { launch(ctx, l, what, check_one_kernel<T>, static_cast<const T*>(x), ctx.fault_number(what), ctx.faults()); });
}

}  // namespace capstan::kernels::cuda
