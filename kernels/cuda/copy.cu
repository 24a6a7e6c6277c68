// Strided copies, casts and fills.
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/grid_plan.h>
#include <kernels/cuda/lane.cuh>

#include <cstring>

namespace capstan::kernels::cuda {

namespace {

constexpr int block = elementwise_block;

template <int Bytes> struct Unit;
template <> struct Unit<1> { using type = std::uint8_t; };
template <> struct Unit<2> { using type = std::uint16_t; };
template <> struct Unit<4> { using type = std::uint32_t; };
template <> struct Unit<8> { using type = std::uint64_t; };
template <> struct Unit<16> { using type = uint4; };

template <class F>
void visit_unit(std::int64_t bytes, F&& f) {
  switch (bytes) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 4: return f.template operator()<4>();
    case 8: return f.template operator()<8>();
    default: return f.template operator()<16>();
  }
}

template <class F>
void visit_number(Num num, F&& f) {
  switch (num) {
    case Num::f64: return f.template operator()<double>();
    case Num::f32: return f.template operator()<float>();
    case Num::bf16: return f.template operator()<bf16>();
    case Num::i32: return f.template operator()<std::int32_t>();
    case Num::i64: return f.template operator()<std::int64_t>();
    case Num::u8:
    case Num::boolean: return f.template operator()<std::uint8_t>();
    default: throw std::invalid_argument("[cuda copy] element type number " + std::to_string(static_cast<int>(num)) + " has no casts");
  }
}

template <class To, class From, class Index>
__global__ void strided_kernel(Strided s, Index n, To* to, const From* from) {
  for (Index i = static_cast<Index>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<Index>(gridDim.x) * block) {
    const Places p = places<Index>(s.shape, s.to, s.from, s.rank, i);
    to[p.a] = convert<To>(from[p.b]);
  }
}

/// Contiguous casts between f32 and bf16, eight elements at a time.
template <class To, class From>
__global__ void cast_kernel(std::int64_t n, To* to, const From* from) {
  constexpr int width = 8;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * block * width;
  for (std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * width; i < n; i += step) {
    if (i + width <= n) {
      Pack<From, width> in;
      Pack<To, width> out;
      in = *reinterpret_cast<const Pack<From, width>*>(from + i);
#pragma unroll
      for (int k = 0; k < width; ++k) out.v[k] = convert<To>(in.v[k]);
      *reinterpret_cast<Pack<To, width>*>(to + i) = out;
    } else {
      for (std::int64_t k = i; k < n; ++k) to[k] = convert<To>(from[k]);
    }
  }
}

/// A matrix turned over in tiles of 32: to[r, c] contiguous in c, from contiguous in r; `batch` of them.
template <class U>
__global__ void transpose_kernel(std::int64_t rows, std::int64_t cols, U* to, std::int64_t to_row, std::int64_t to_batch, const U* from,
                                 std::int64_t from_col, std::int64_t from_batch) {
  __shared__ U tile[32][33];
  const std::int64_t c0 = static_cast<std::int64_t>(blockIdx.x) * 32, r0 = static_cast<std::int64_t>(blockIdx.y) * 32;
  to += blockIdx.z * to_batch, from += blockIdx.z * from_batch;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int k = y; k < 32; k += 8)
    if (r0 + x < rows && c0 + k < cols) tile[k][x] = from[(c0 + k) * from_col + r0 + x];
  __syncthreads();
  for (int k = y; k < 32; k += 8)
    if (r0 + k < rows && c0 + x < cols) to[(r0 + k) * to_row + c0 + x] = tile[x][k];
}

template <class U, class Index>
__global__ void fill_kernel(Strided s, Index n, U* to, U value) {
  for (Index i = static_cast<Index>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<Index>(gridDim.x) * block)
    to[places<Index>(s.shape, s.to, s.to, s.rank, i).a] = value;
}

Launch elementwise_launch(std::int64_t items) {
  Launch l;
  l.grid_x = static_cast<unsigned>(grid_for(items, block).blocks);
  l.block = block;
  return l;
}

bool flat(const Strided& s, bool both) { return s.rank == 1 && s.to[0] == 1 && (!both || s.from[0] == 1); }

/// True when it was a transposition that the tiles can do.
template <int Bytes>
bool transposed(Context& ctx, const Strided& s, void* to, const void* from) {
  using U = typename Unit<Bytes>::type;
  const Blocks blocks = transpose_blocks(s);
  if (blocks.x == 0) return false;
  const int r = s.rank - 2, c = s.rank - 1;
  Launch l;
  l.grid_x = static_cast<unsigned>(blocks.x), l.grid_y = static_cast<unsigned>(blocks.y), l.grid_z = static_cast<unsigned>(blocks.z);
  l.block = 256;
  launch(ctx, l, "transposing copy", transpose_kernel<U>, s.shape[r], s.shape[c], static_cast<U*>(to), s.to[r], s.rank == 3 ? s.to[0] : std::int64_t{0},
         static_cast<const U*>(from), s.from[c], s.rank == 3 ? s.from[0] : std::int64_t{0});
  return true;
}

template <class To, class From>
void walk(Context& ctx, const Strided& s, void* to, const void* from) {
  const std::int64_t n = elements(s);
  if (n < (std::int64_t{1} << 31))
    launch(ctx, elementwise_launch(n), "copy", strided_kernel<To, From, std::uint32_t>, s, static_cast<std::uint32_t>(n), static_cast<To*>(to), static_cast<const From*>(from));
  else
    launch(ctx, elementwise_launch(n), "copy", strided_kernel<To, From, std::int64_t>, s, n, static_cast<To*>(to), static_cast<const From*>(from));
}

bool aligned(const void* p, std::uintptr_t to) { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

}  // namespace

void copy(Context& ctx, const Strided& shape, Num to_num, void* to, Num from_num, const void* from) {
  if (elements(shape) == 0) return;
  const Strided s = merged(shape);
  const std::int64_t n = elements(s);
  if (to_num == from_num) {
    if (flat(s, true)) {
      ctx.move(to, from, n * bytes_of(to_num), "copying");
      return;
    }
    const CopyPlan plan = copy_plan(s, bytes_of(to_num), to, from);
    visit_unit(plan.unit, [&]<int Bytes>() {
      using U = typename Unit<Bytes>::type;
      if (!transposed<Bytes>(ctx, plan.shape, to, from)) walk<U, U>(ctx, plan.shape, to, from);
    });
    return;
  }
  if (flat(s, true) && aligned(to, 32) && aligned(from, 32)) {
    const Launch l = elementwise_launch(blocks_for(n, 8));
    if (to_num == Num::bf16 && from_num == Num::f32) return launch(ctx, l, "cast", cast_kernel<bf16, float>, n, static_cast<bf16*>(to), static_cast<const float*>(from));
    if (to_num == Num::f32 && from_num == Num::bf16) return launch(ctx, l, "cast", cast_kernel<float, bf16>, n, static_cast<float*>(to), static_cast<const bf16*>(from));
  }
  visit_number(to_num, [&]<class To>() {
    visit_number(from_num, [&]<class From>() {
      if constexpr (!std::is_same_v<To, From>) walk<To, From>(ctx, s, to, from);
      else walk<To, From>(ctx, s, to, from);
    });
  });
}

void fill(Context& ctx, const Strided& shape, Num num, void* to, double value) {
  if (elements(shape) == 0) return;
  Strided both = shape;
  for (int d = 0; d < both.rank; ++d) both.from[d] = both.to[d];
  const Strided s = merged(both);
  const std::int64_t n = elements(s);
  if (value == 0 && !std::signbit(value) && flat(s, false)) {
    ctx.clear(to, n * bytes_of(num), "clearing");
    return;
  }
  visit_number(num, [&]<class T>() {
    const T v = [&] {
      if constexpr (std::is_same_v<T, bf16>) return bf16(static_cast<float>(value));
      else return static_cast<T>(value);
    }();
    typename Unit<sizeof(T)>::type bits;
    std::memcpy(&bits, &v, sizeof v);
    using U = typename Unit<sizeof(T)>::type;
    if (n < (std::int64_t{1} << 31))
      launch(ctx, elementwise_launch(n), "fill", fill_kernel<U, std::uint32_t>, s, static_cast<std::uint32_t>(n), static_cast<U*>(to), bits);
    else
      launch(ctx, elementwise_launch(n), "fill", fill_kernel<U, std::int64_t>, s, n, static_cast<U*>(to), bits);
  });
}

}  // namespace capstan::kernels::cuda
