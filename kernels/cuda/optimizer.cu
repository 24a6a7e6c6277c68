// The optimizers' arithmetic, rounded as on the CPU (compiled with -fmad=false).
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/lane.cuh>
#include <kernels/cuda/plan.h>

namespace capstan::kernels::cuda {

namespace {

constexpr int block = elementwise_block;

Launch launch_for(std::int64_t items) {
  Launch l;
  l.grid_x = static_cast<unsigned>(grid_for(items, block).blocks);
  l.block = block;
  return l;
}

template <class F>
void visit_state(Num num, Num state, F&& f) {
  if (num == Num::f32 && state == Num::f32) f.template operator()<float, float>();
  else if (num == Num::f64 && state == Num::f64) f.template operator()<double, double>();
  else if (num == Num::f64 && state == Num::f32) f.template operator()<double, float>();
  else throw std::invalid_argument("[cuda] optimizers take f32 values with f32 state, or f64 values with f32 or f64 state");
}

/// The numbers of this step: those that the launch was given, or under a record those that lie on the device.
template <class N>
__device__ __forceinline__ N numbers_of(const N& given, const N* recorded) { return recorded == nullptr ? given : *recorded; }

/// What multiplies the gradient: the host's factor, and the gate's where one is obeyed.
template <class T>
__device__ __forceinline__ T gradient_scale(double scale, const Gate* gate) { return gate == nullptr ? T(scale) : T(scale * gate->factor); }
__device__ __forceinline__ bool is_shut(const Gate* gate) { return gate != nullptr && gate->shut != 0; }

template <class T>
struct AdamWNumbers { double grad_scale; T keep, rate, beta1_rest, beta2, beta2_rest, v_scale, epsilon; };

template <class T, class S>
__device__ __forceinline__ void adamw_element(const AdamWNumbers<T>& s, T scale, T& value, T grad, S& m, S& v) {
  const T g = grad * scale;
  const T m_old = static_cast<T>(m);
  const T m_new = m_old + s.beta1_rest * (g - m_old);
  const T v_new = s.beta2 * static_cast<T>(v) + s.beta2_rest * (g * g);
  m = static_cast<S>(m_new);
  v = static_cast<S>(v_new);
  value = s.keep * value - s.rate * (m_new / (::sqrt(v_new) * s.v_scale + s.epsilon));
}

template <class T, class S, int N>
__global__ void adamw_kernel(AdamWNumbers<T> given, const AdamWNumbers<T>* recorded, const Gate* gate, std::int64_t n, T* value, const T* grad, S* m, S* v) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x) * N;
  if (is_shut(gate)) return;
  const AdamWNumbers<T> s = numbers_of(given, recorded);
  const T scale = gradient_scale<T>(s.grad_scale, gate);
  if (i + N <= n) {
    Pack<T, N> p = *reinterpret_cast<Pack<T, N>*>(value + i);
    const Pack<T, N> g = *reinterpret_cast<const Pack<T, N>*>(grad + i);
    Pack<S, N> a = *reinterpret_cast<Pack<S, N>*>(m + i), b = *reinterpret_cast<Pack<S, N>*>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) adamw_element<T, S>(s, scale, p.v[k], g.v[k], a.v[k], b.v[k]);
    *reinterpret_cast<Pack<T, N>*>(value + i) = p;
    *reinterpret_cast<Pack<S, N>*>(m + i) = a;
    *reinterpret_cast<Pack<S, N>*>(v + i) = b;
  } else {
    for (std::int64_t k = i; k < n; ++k) adamw_element<T, S>(s, scale, value[k], grad[k], m[k], v[k]);
  }
}

template <class T>
struct SgdNumbers { double grad_scale; T decay, momentum, lr; bool nesterov; };

template <class T, class S>
__global__ void sgd_kernel(SgdNumbers<T> given, const SgdNumbers<T>* recorded, const Gate* gate, std::int64_t n, T* value, const T* grad, S* buffer) {
  if (is_shut(gate)) return;
  const SgdNumbers<T> s = numbers_of(given, recorded);
  const T scale = gradient_scale<T>(s.grad_scale, gate);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<std::int64_t>(gridDim.x) * block) {
    const T g = grad[i] * scale + s.decay * value[i];
    if (buffer == nullptr) {
      value[i] -= s.lr * g;
      continue;
    }
    const T b = s.momentum * static_cast<T>(buffer[i]) + g;
    buffer[i] = static_cast<S>(b);
    value[i] -= s.lr * (s.nesterov ? g + s.momentum * b : b);
  }
}

template <class T>
struct MomentumNumbers { double grad_scale; T mu; bool nesterov; };

template <class T, class S>
__global__ void momentum_kernel(MomentumNumbers<T> given, const MomentumNumbers<T>* recorded, const Gate* gate, std::int64_t n, std::int64_t cols, std::int64_t stride, const T* grad, S* buffer, T* direction) {
  const bool shut = is_shut(gate);  // then the direction is still made, of nothing that is kept
  const MomentumNumbers<T> s = numbers_of(given, recorded);
  const T scale = gradient_scale<T>(s.grad_scale, gate);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<std::int64_t>(gridDim.x) * block) {
    const std::int64_t row = i / cols, at = row * stride + (i - row * cols);
    const T g = grad[at] * scale;
    const T b = s.mu * static_cast<T>(buffer[at]) + (1 - s.mu) * g;
    if (!shut) buffer[at] = static_cast<S>(b);
    direction[i] = s.nesterov ? (1 - s.mu) * g + s.mu * b : b;
  }
}

template <class T>
struct AxpbyNumbers { T a, b; };

template <class T>
__global__ void axpby_kernel(AxpbyNumbers<T> given, const AxpbyNumbers<T>* recorded, const Gate* gate, std::int64_t n, std::int64_t cols, const T* x, std::int64_t x_stride, const T* y, std::int64_t y_stride, T* out,
                             std::int64_t out_stride) {
  if (is_shut(gate)) return;
  const AxpbyNumbers<T> s = numbers_of(given, recorded);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * block + threadIdx.x; i < n; i += static_cast<std::int64_t>(gridDim.x) * block) {
    const std::int64_t row = i / cols, col = i - row * cols;
    const T u = s.a * x[row * x_stride + col];
    out[row * out_stride + col] = y == nullptr ? u : u + s.b * y[row * y_stride + col];
  }
}

}  // namespace

void adamw(Context& ctx, const AdamWStep& step, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* m, void* v) {
  visit_state(num, state_num, [&]<class T, class S>() {
    const AdamWNumbers<T> s{step.grad_scale, T(step.keep), T(step.rate), T(step.beta1_rest), T(step.beta2), T(step.beta2_rest), T(step.v_scale), T(step.epsilon)};
    const AdamWNumbers<T>* recorded = ctx.step_numbers(s);
    constexpr int wide = 16 / sizeof(T);
    auto *p = static_cast<T*>(value);
    const auto* g = static_cast<const T*>(grad);
    auto *a = static_cast<S*>(m), *b = static_cast<S*>(v);
    if (vector_width(sizeof(T), {value, grad, m, v}) == wide) launch(ctx, launch_for(blocks_for(n, wide)), "adamw", adamw_kernel<T, S, wide>, s, recorded, ctx.gate, n, p, g, a, b);
    else launch(ctx, launch_for(n), "adamw", adamw_kernel<T, S, 1>, s, recorded, ctx.gate, n, p, g, a, b);
  });
}

void sgd(Context& ctx, const SgdStep& step, Num num, Num state_num, std::int64_t n, void* value, const void* grad, void* buffer) {
  visit_state(num, state_num, [&]<class T, class S>() {
    const SgdNumbers<T> s{step.grad_scale, T(step.decay), T(step.momentum), T(step.lr), step.nesterov};
    launch(ctx, launch_for(n), "sgd", sgd_kernel<T, S>, s, ctx.step_numbers(s), ctx.gate, n, static_cast<T*>(value), static_cast<const T*>(grad), static_cast<S*>(buffer));
  });
}

void momentum(Context& ctx, const MomentumStep& step, Num num, Num state_num, std::int64_t rows, std::int64_t cols, std::int64_t stride,
              const void* grad, void* buffer, void* direction) {
  visit_state(num, state_num, [&]<class T, class S>() {
    const std::int64_t n = rows * cols;
    const MomentumNumbers<T> s{step.grad_scale, T(step.mu), step.nesterov};
    launch(ctx, launch_for(n), "momentum", momentum_kernel<T, S>, s, ctx.step_numbers(s), ctx.gate, n, cols, stride, static_cast<const T*>(grad),
           static_cast<S*>(buffer), static_cast<T*>(direction));
  });
}

void axpby(Context& ctx, Num num, std::int64_t rows, std::int64_t cols, double a, const void* x, std::int64_t x_stride, double b,
           const void* y, std::int64_t y_stride, void* out, std::int64_t out_stride) {
  const auto run = [&]<class T>() {
    const std::int64_t n = rows * cols;
    const AxpbyNumbers<T> s{T(a), T(b)};
    launch(ctx, launch_for(n), "axpby", axpby_kernel<T>, s, ctx.step_numbers(s), ctx.gate, n, cols, static_cast<const T*>(x), x_stride, static_cast<const T*>(y), y_stride,
           static_cast<T*>(out), out_stride);
  };
  if (num == Num::f64) run.template operator()<double>();
  else run.template operator()<float>();
}

}  // namespace capstan::kernels::cuda
