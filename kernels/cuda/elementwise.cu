// Element by element kernels. Products and sums are not contracted (the file is compiled with -fmad=false): they round as on
// the CPU.
#include <capstan/kernels/philox.h>
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/lane.cuh>
#include <kernels/cuda/plan.h>

#include <cmath>

namespace capstan::kernels::cuda {

namespace {

constexpr int block = elementwise_block;

Launch launch_for(std::int64_t items) {
  Launch l;
  l.grid_x = static_cast<unsigned>(grid_for(items, block).blocks);
  l.block = block;
  return l;
}

/// Element functions: of one or two inputs in the compute type.
struct ExpOf { template <class V> __device__ V operator()(V x) const { return exp(x); } };
struct LogOf { template <class V> __device__ V operator()(V x) const { return log(x); } };
struct SqrtOf { template <class V> __device__ V operator()(V x) const { return sqrt(x); } };
struct TanhOf { template <class V> __device__ V operator()(V x) const { return tanh(x); } };
struct SigmoidOf { template <class V> __device__ V operator()(V x) const { return sigmoid(x); } };
struct GeluOf { template <class V> __device__ V operator()(V x) const { return gelu_of(x); } };
struct SiluOf { template <class V> __device__ V operator()(V x) const { return silu_of(x); } };
/// (saved, gradient) -> gradient of the input.
struct ExpSlope { template <class V> __device__ V operator()(V y, V g) const { return g * y; } };
struct LogSlope { template <class V> __device__ V operator()(V x, V g) const { return g * log_slope(x); } };
struct SqrtSlope { template <class V> __device__ V operator()(V y, V g) const { return g * sqrt_slope(y); } };
struct TanhSlope { template <class V> __device__ V operator()(V x, V g) const { return g * tanh_slope(x); } };
struct SigmoidSlope { template <class V> __device__ V operator()(V x, V g) const { return g * sigmoid_slope(x); } };
struct GeluSlope { template <class V> __device__ V operator()(V x, V g) const { return g * gelu_slope(x); } };
struct SiluSlope { template <class V> __device__ V operator()(V x, V g) const { return g * silu_slope(x); } };
struct Add { template <class V> __device__ V operator()(V a, V b) const { return a + b; } };
struct Sub { template <class V> __device__ V operator()(V a, V b) const { return a - b; } };
struct Mul { template <class V> __device__ V operator()(V a, V b) const { return a * b; } };
struct Div { template <class V> __device__ V operator()(V a, V b) const { return a / b; } };
template <class C>
struct Scale {
  C factor, shift;
  template <class V> __device__ V operator()(V x) const { return fma(x, V(factor), V(shift)); }
  std::uint64_t bits() const { return bits_of_number(factor) * 31 + bits_of_number(shift); }
};

template <class T, class F>
__device__ __forceinline__ T apply(const F& f, T a) { return T(f(Lane<Compute<T>>(static_cast<Compute<T>>(a))).v); }
template <class T, class F>
__device__ __forceinline__ T apply(const F& f, T a, T b) {
  using L = Lane<Compute<T>>;
  return T(f(L(static_cast<Compute<T>>(a)), L(static_cast<Compute<T>>(b))).v);
}

template <class T, int N, class F>
__global__ void map1_kernel(std::int64_t n, const T* a, T* out, F f) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (i + N <= n) {
    const Pack<T, N> x = *reinterpret_cast<const Pack<T, N>*>(a + i);
    Pack<T, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) y.v[k] = apply<T>(f, x.v[k]);
    *reinterpret_cast<Pack<T, N>*>(out + i) = y;
  } else {
    for (std::int64_t k = i; k < n; ++k) out[k] = apply<T>(f, a[k]);
  }
}

template <class T, int N, class F>
__global__ void map2_kernel(std::int64_t n, const T* a, const T* b, T* out, F f) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (i + N <= n) {
    const Pack<T, N> x = *reinterpret_cast<const Pack<T, N>*>(a + i), y = *reinterpret_cast<const Pack<T, N>*>(b + i);
    Pack<T, N> z;
#pragma unroll
    for (int k = 0; k < N; ++k) z.v[k] = apply<T>(f, x.v[k], y.v[k]);
    *reinterpret_cast<Pack<T, N>*>(out + i) = z;
  } else {
    for (std::int64_t k = i; k < n; ++k) out[k] = apply<T>(f, a[k], b[k]);
  }
}

template <class T, class Index, class F>
__global__ void broadcast_kernel(Broadcast s, Index n, const T* a, const T* b, T* out, F f) {
  for (Index i = static_cast<Index>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<Index>(gridDim.x) * block) {
    const Places p = places<Index>(s.shape, s.a, s.b, s.rank, i);
    out[i] = apply<T>(f, a[p.a], b[p.b]);
  }
}

template <class T, class F>
void map1(Context& ctx, const char* name, std::int64_t n, const void* a, void* out, F f) {
  constexpr int width = 16 / sizeof(T);
  if (vector_width(sizeof(T), {a, out}) == width) launch(ctx, launch_for(blocks_for(n, width)), name, map1_kernel<T, width, F>, n, static_cast<const T*>(a), static_cast<T*>(out), f);
  else launch(ctx, launch_for(n), name, map1_kernel<T, 1, F>, n, static_cast<const T*>(a), static_cast<T*>(out), f);
}

template <class T, class F>
void map2(Context& ctx, const char* name, std::int64_t n, const void* a, const void* b, void* out, F f) {
  constexpr int width = 16 / sizeof(T);
  if (vector_width(sizeof(T), {a, b, out}) == width)
    launch(ctx, launch_for(blocks_for(n, width)), name, map2_kernel<T, width, F>, n, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), f);
  else
    launch(ctx, launch_for(n), name, map2_kernel<T, 1, F>, n, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), f);
}

template <class T, class F>
void broadcast(Context& ctx, const Broadcast& shape, const void* a, const void* b, void* out, F f) {
  const std::int64_t n = elements(shape);
  if (n == 0) return;
  const Broadcast s = merged(shape);
  if (s.rank == 1 && (s.shape[0] == 1 || (s.a[0] == 1 && s.b[0] == 1))) return map2<T>(ctx, "binary", n, a, b, out, f);
  if (n < (std::int64_t{1} << 31))
    launch(ctx, launch_for(n), "binary", broadcast_kernel<T, std::uint32_t, F>, s, static_cast<std::uint32_t>(n), static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), f);
  else
    launch(ctx, launch_for(n), "binary", broadcast_kernel<T, std::int64_t, F>, s, n, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), f);
}

template <class T, int N>
__global__ void swiglu_kernel(std::int64_t n, std::int64_t width, const T* gate_up, T* y) {
  using L = Lane<Compute<T>>;
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (i >= n) return;
  const std::int64_t row = i / width, col = i - row * width;
  const T* gate = gate_up + row * 2 * width + col;
  const Pack<T, N> a = *reinterpret_cast<const Pack<T, N>*>(gate), b = *reinterpret_cast<const Pack<T, N>*>(gate + width);
  Pack<T, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.v[k] = T((silu_of(L(static_cast<Compute<T>>(a.v[k]))) * L(static_cast<Compute<T>>(b.v[k]))).v);
  *reinterpret_cast<Pack<T, N>*>(y + i) = out;
}

template <class T, int N>
__global__ void swiglu_backward_kernel(std::int64_t n, std::int64_t width, const T* gate_up, const T* g, T* dx) {
  using C = Compute<T>;
  using L = Lane<C>;
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (i >= n) return;
  const std::int64_t row = i / width, at = row * 2 * width + (i - row * width);
  const Pack<T, N> a = *reinterpret_cast<const Pack<T, N>*>(gate_up + at), b = *reinterpret_cast<const Pack<T, N>*>(gate_up + at + width),
                   d = *reinterpret_cast<const Pack<T, N>*>(g + i);
  Pack<T, N> d_gate, d_up;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const L x(static_cast<C>(a.v[k])), u(static_cast<C>(b.v[k])), grad(static_cast<C>(d.v[k])), one(C(1)), s = sigmoid(x);
    d_up.v[k] = T((grad * (x * s)).v);
    d_gate.v[k] = T((grad * u * (s * fma(x, one - s, one))).v);
  }
  *reinterpret_cast<Pack<T, N>*>(dx + at) = d_gate;
  *reinterpret_cast<Pack<T, N>*>(dx + at + width) = d_up;
}

/// One thread, one aligned Philox block of a row: at most four elements.
template <class T>
__global__ void dropout_kernel(std::int64_t rows, std::int64_t cols, std::int64_t groups, const T* x, const std::int64_t* sample_ids,
                               std::uint32_t threshold, Compute<T> scale, std::uint64_t key, std::uint64_t step, const std::uint64_t* later, T* y) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x;
  const std::int64_t row = i / groups;
  if (row >= rows) return;
  const std::uint64_t base = static_cast<std::uint64_t>(sample_ids[row]) * static_cast<std::uint64_t>(cols);
  const std::uint64_t number = base / 4 + static_cast<std::uint64_t>(i - row * groups);  // of the Philox block
  if (later != nullptr) step += *later;  // a record, replayed in another step
  const Philox4 bits = philox4x32_10(key, step, number);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const std::int64_t c = static_cast<std::int64_t>(number * 4 + static_cast<std::uint64_t>(k) - base);
    if (c < 0 || c >= cols) continue;
    const std::int64_t at = row * cols + c;
    y[at] = bits.v[k] >= threshold ? T(static_cast<Compute<T>>(x[at]) * scale) : T(Compute<T>(0));
  }
}

template <class T>
__global__ void rope_table_kernel(std::int64_t n, std::int64_t half, std::int64_t size, double theta, const std::int32_t* positions, T* table) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x;
  if (at >= n) return;
  const std::int64_t t = at / half, i = at - t * half;
  const double rate = ::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(size));
  const double angle = static_cast<double>(positions[t]) * rate;
  // In half turns, with what the division rounds away put back: cos and sin themselves keep tables in local memory.
  constexpr double pi = 3.141592653589793, turns = 0.3183098861837907, turns_low = -1.9678676675182486e-17;
  const double half_turns = angle * turns;
  const double rest = pi * ::fma(angle, turns_low, ::fma(angle, turns, -half_turns));
  double s, c;
  ::sincospi(half_turns, &s, &c);
  table[t * size + i] = static_cast<T>(::fma(-s, rest, c));
  table[t * size + half + i] = static_cast<T>(::fma(c, rest, s));
}

template <class T, int N>
__global__ void rope_kernel(std::int64_t n, std::int64_t heads, std::int64_t half, const T* x, std::int64_t stride, const Compute<T>* table, T* y,
                            bool inverse) {
  using C = Compute<T>;
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (at >= n) return;
  const std::int64_t pair = at / half, i = at - pair * half, t = pair / heads, h = pair - t * heads, size = 2 * half;
  const T* from = x + t * stride + h * size + i;
  T* to = y + pair * size + i;
  const C *cosine = table + t * size + i, *sine = cosine + half;
  const Pack<T, N> a = *reinterpret_cast<const Pack<T, N>*>(from), b = *reinterpret_cast<const Pack<T, N>*>(from + half);
  Pack<T, N> first, second;
  const C sign = inverse ? C(-1) : C(1);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const C u = static_cast<C>(a.v[k]), w = static_cast<C>(b.v[k]), c = cosine[k], s = sine[k] * sign;
    first.v[k] = T(::fma(u, c, -(w * s)));
    second.v[k] = T(::fma(w, c, u * s));
  }
  *reinterpret_cast<Pack<T, N>*>(to) = first;
  *reinterpret_cast<Pack<T, N>*>(to + half) = second;
}

template <class T>
__global__ void local_ids_kernel(std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, T* mine,
                                 T* others) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x;
  if (t >= count) return;
  const std::int64_t at = ids[t] - begin;
  const bool has = at >= 0 && at < rows;
  if (mine != nullptr) mine[t] = has ? T(1) : T(0);
  if (others != nullptr) others[t] = !has && ids[t] >= 0 ? T(1) : T(0);
  local[t] = has ? static_cast<std::int32_t>(at) : -1;
}

template <class T>
__global__ void random_kernel(RandomFill fill, std::int64_t n, T* to) {
  const std::uint64_t first = fill.begin / 4 + static_cast<std::uint64_t>(blockIdx.x) * block + threadIdx.x;
  if (first * 4 >= fill.begin + static_cast<std::uint64_t>(n)) return;
  const Philox4 bits = philox4x32_10(fill.key, fill.step, first);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const std::uint64_t i = first * 4 + static_cast<std::uint64_t>(lane);
    if (i < fill.begin || i >= fill.begin + static_cast<std::uint64_t>(n)) continue;
    to[i - fill.begin] = convert<T>(random_value(bits.v[lane], fill.normal, fill.scale));
  }
}

}  // namespace

void binary(Context& ctx, BinaryOp op, const Broadcast& shape, Num num, const void* a, const void* b, void* out) {
  visit(num, [&]<class T>() {
    switch (op) {
      case BinaryOp::add: return broadcast<T>(ctx, shape, a, b, out, Add{});
      case BinaryOp::sub: return broadcast<T>(ctx, shape, a, b, out, Sub{});
      case BinaryOp::mul: return broadcast<T>(ctx, shape, a, b, out, Mul{});
      case BinaryOp::div: return broadcast<T>(ctx, shape, a, b, out, Div{});
    }
  });
}

void unary(Context& ctx, UnaryOp op, Num num, std::int64_t n, const void* x, void* y) {
  visit(num, [&]<class T>() {
    switch (op) {
      case UnaryOp::exp: return map1<T>(ctx, "exp", n, x, y, ExpOf{});
      case UnaryOp::log: return map1<T>(ctx, "log", n, x, y, LogOf{});
      case UnaryOp::sqrt: return map1<T>(ctx, "sqrt", n, x, y, SqrtOf{});
      case UnaryOp::tanh: return map1<T>(ctx, "tanh", n, x, y, TanhOf{});
      case UnaryOp::sigmoid: return map1<T>(ctx, "sigmoid", n, x, y, SigmoidOf{});
      case UnaryOp::gelu: return map1<T>(ctx, "gelu", n, x, y, GeluOf{});
      case UnaryOp::silu: return map1<T>(ctx, "silu", n, x, y, SiluOf{});
    }
  });
}

void unary_backward(Context& ctx, UnaryOp op, Num num, std::int64_t n, const void* saved, const void* g, void* dx) {
  visit(num, [&]<class T>() {
    switch (op) {
      case UnaryOp::exp: return map2<T>(ctx, "exp dx", n, saved, g, dx, ExpSlope{});
      case UnaryOp::log: return map2<T>(ctx, "log dx", n, saved, g, dx, LogSlope{});
      case UnaryOp::sqrt: return map2<T>(ctx, "sqrt dx", n, saved, g, dx, SqrtSlope{});
      case UnaryOp::tanh: return map2<T>(ctx, "tanh dx", n, saved, g, dx, TanhSlope{});
      case UnaryOp::sigmoid: return map2<T>(ctx, "sigmoid dx", n, saved, g, dx, SigmoidSlope{});
      case UnaryOp::gelu: return map2<T>(ctx, "gelu dx", n, saved, g, dx, GeluSlope{});
      case UnaryOp::silu: return map2<T>(ctx, "silu dx", n, saved, g, dx, SiluSlope{});
    }
  });
}

void scale(Context& ctx, Num num, std::int64_t n, const void* x, double factor, double shift, void* y) {
  visit(num, [&]<class T>() {
    using C = Compute<T>;
    map1<T>(ctx, "scale", n, x, y, Scale<C>{static_cast<C>(factor), static_cast<C>(shift)});
  });
}

void add(Context& ctx, Num num, std::int64_t n, const void* x, const void* y, void* out) {
  visit(num, [&]<class T>() { map2<T>(ctx, "add", n, x, y, out, Add{}); });
}

void swiglu(Context& ctx, Num num, std::int64_t rows, std::int64_t width, const void* gate_up, void* y) {
  visit(num, [&]<class T>() {
    constexpr int wide = 16 / sizeof(T);
    const std::int64_t n = rows * width;
    if (width % wide == 0 && vector_width(sizeof(T), {gate_up, y}) == wide)
      launch(ctx, launch_for(blocks_for(n, wide)), "swiglu", swiglu_kernel<T, wide>, n, width, static_cast<const T*>(gate_up), static_cast<T*>(y));
    else
      launch(ctx, launch_for(n), "swiglu", swiglu_kernel<T, 1>, n, width, static_cast<const T*>(gate_up), static_cast<T*>(y));
  });
}

void swiglu_backward(Context& ctx, Num num, std::int64_t rows, std::int64_t width, const void* gate_up, const void* g, void* dx) {
  visit(num, [&]<class T>() {
    constexpr int wide = 16 / sizeof(T);
    const std::int64_t n = rows * width;
    const auto *x = static_cast<const T*>(gate_up), *grad = static_cast<const T*>(g);
    if (width % wide == 0 && vector_width(sizeof(T), {gate_up, g, dx}) == wide)
      launch(ctx, launch_for(blocks_for(n, wide)), "swiglu dx", swiglu_backward_kernel<T, wide>, n, width, x, grad, static_cast<T*>(dx));
    else
      launch(ctx, launch_for(n), "swiglu dx", swiglu_backward_kernel<T, 1>, n, width, x, grad, static_cast<T*>(dx));
  });
}

void dropout(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, const void* x, const std::int64_t* sample_ids, double p,
             std::uint64_t key, std::uint64_t step, void* y) {
  if (rows == 0 || cols == 0) return;
  // (bits + 0.5) 2^-32 >= p, as integers.
  const auto threshold = static_cast<std::uint32_t>(std::ceil(std::ldexp(p, 32) - 0.5));
  const std::uint64_t* later = nullptr;
  if (const Context::Record* record = ctx.record()) {
    if (step != record->step) ctx.refuse_in_record("dropout with a step number that is not the training step's");
    later = record->step_offset;
  }
  const std::int64_t groups = (cols + 6) / 4;  // aligned blocks that a row can touch, wherever it begins
  visit(num, [&]<class T>() {
    launch(ctx, launch_for(rows * groups), "dropout", dropout_kernel<T>, rows, cols, groups, static_cast<const T*>(x), sample_ids, threshold,
           static_cast<Compute<T>>(1.0 / (1.0 - p)), key, step, later, static_cast<T*>(y));
  });
}

void rope_table(Context& ctx, Num num, std::int64_t rows, std::int64_t size, double theta, const std::int32_t* positions, void* table) {
  const std::int64_t half = size / 2, n = rows * half;
  if (num == Num::f64) launch(ctx, launch_for(n), "rope_table", rope_table_kernel<double>, n, half, size, theta, positions, static_cast<double*>(table));
  else launch(ctx, launch_for(n), "rope_table", rope_table_kernel<float>, n, half, size, theta, positions, static_cast<float*>(table));
}

void rope(Context& ctx, Num num, std::int64_t rows, std::int64_t heads, std::int64_t size, const void* x, std::int64_t stride,
          const void* table, void* y, bool inverse) {
  const std::int64_t half = size / 2, n = rows * heads * half;
  visit(num, [&]<class T>() {
    constexpr int wide = 16 / sizeof(T);
    const auto* angles = static_cast<const Compute<T>*>(table);
    if (half % wide == 0 && stride % wide == 0 && vector_width(sizeof(T), {x, y}) == wide)
      launch(ctx, launch_for(blocks_for(n, wide)), "rope", rope_kernel<T, wide>, n, heads, half, static_cast<const T*>(x), stride, angles, static_cast<T*>(y), inverse);
    else
      launch(ctx, launch_for(n), "rope", rope_kernel<T, 1>, n, heads, half, static_cast<const T*>(x), stride, angles, static_cast<T*>(y), inverse);
  });
}

void local_ids(Context& ctx, std::int64_t count, const std::int32_t* ids, std::int64_t begin, std::int64_t rows, std::int32_t* local, Num num,
               void* mine, void* others) {
  const auto run = [&]<class T>() {
    launch(ctx, launch_for(count), "local_ids", local_ids_kernel<T>, count, ids, begin, rows, local, static_cast<T*>(mine), static_cast<T*>(others));
  };
  if (num == Num::f64) run.template operator()<double>();
  else run.template operator()<float>();
}

void random(Context& ctx, Num num, const RandomFill& fill, std::int64_t n, void* to) {
  if (n == 0) return;
  visit(num, [&]<class T>() { launch(ctx, launch_for(n / 4 + 2), "random", random_kernel<T>, fill, n, static_cast<T*>(to)); });
}

}  // namespace capstan::kernels::cuda
