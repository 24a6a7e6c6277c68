// The optimizers' arithmetic in one pass over memory, and the reductions over gradients.
#include <kernels/cpu/optimizer.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t block = 1 << 14;

/// The numbers of a step in the arithmetic's type.
template <class T>
struct AdamWNumbers {
  T grad_scale, keep, rate, beta1_rest, beta2, beta2_rest, v_scale, epsilon;
};

template <class T, class S>
void adamw_range(const AdamWNumbers<T>& numbers, T* __restrict value, const T* __restrict grad, S* __restrict m, S* __restrict v,
                 std::int64_t begin, std::int64_t end) {
  const AdamWNumbers<T> s = numbers;  // in registers: the stores below cannot change it
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const T g = grad[i] * s.grad_scale;
    const T m_old = static_cast<T>(m[i]);
    const T m_new = m_old + s.beta1_rest * (g - m_old);
    const T v_new = s.beta2 * static_cast<T>(v[i]) + s.beta2_rest * (g * g);
    m[i] = static_cast<S>(m_new);
    v[i] = static_cast<S>(v_new);
    value[i] = s.keep * value[i] - s.rate * (m_new / (std::sqrt(v_new) * s.v_scale + s.epsilon));
  }
}

template <class T>
struct SgdNumbers {
  T grad_scale, decay, momentum, lr;
  bool nesterov;
};

template <class T, class S>
void sgd_range(const SgdNumbers<T>& numbers, T* __restrict value, const T* __restrict grad, S* __restrict buffer, std::int64_t begin,
               std::int64_t end) {
  const SgdNumbers<T> s = numbers;
  if (buffer == nullptr) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) value[i] -= s.lr * (grad[i] * s.grad_scale + s.decay * value[i]);
    return;
  }
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const T g = grad[i] * s.grad_scale + s.decay * value[i];
    const T b = s.momentum * static_cast<T>(buffer[i]) + g;
    buffer[i] = static_cast<S>(b);
    value[i] -= s.lr * (s.nesterov ? g + s.momentum * b : b);
  }
}

/// f(begin, end) for each block of n elements, over the threads.
template <class F>
void for_ranges(Context& ctx, std::int64_t n, F f) {
  const std::int64_t blocks = (n + block - 1) / block;
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (blocks > 1)
  for (std::int64_t b = 0; b < blocks; ++b) f(b * block, std::min(n, (b + 1) * block));
}

}  // namespace

template <class T, class S>
void adamw(Context& ctx, const AdamWStep& step, std::int64_t n, T* value, const T* grad, S* m, S* v) {
  const AdamWNumbers<T> s{T(step.grad_scale), T(step.keep), T(step.rate), T(step.beta1_rest), T(step.beta2), T(step.beta2_rest), T(step.v_scale), T(step.epsilon)};
  for_ranges(ctx, n, [&](std::int64_t begin, std::int64_t end) { adamw_range<T, S>(s, value, grad, m, v, begin, end); });
}

template <class T, class S>
void sgd(Context& ctx, const SgdStep& step, std::int64_t n, T* value, const T* grad, S* buffer) {
  const SgdNumbers<T> s{T(step.grad_scale), T(step.decay), T(step.momentum), T(step.lr), step.nesterov};
  for_ranges(ctx, n, [&](std::int64_t begin, std::int64_t end) { sgd_range<T, S>(s, value, grad, buffer, begin, end); });
}

template <class T, class S>
void momentum(Context& ctx, const MomentumStep& step, std::int64_t rows, std::int64_t cols, std::int64_t stride, const T* grad, S* buffer,
              T* direction) {
  const T scale = T(step.grad_scale), mu = T(step.mu);
  const bool nesterov = step.nesterov;
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (rows * cols > (1 << 14))
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j) {
      const T g = grad[i * stride + j] * scale;
      const T b = mu * static_cast<T>(buffer[i * stride + j]) + (1 - mu) * g;
      buffer[i * stride + j] = static_cast<S>(b);
      direction[i * cols + j] = nesterov ? (1 - mu) * g + mu * b : b;
    }
}

template <class T>
void axpby(Context& ctx, std::int64_t rows, std::int64_t cols, double a, const T* x, std::int64_t x_stride, double b, const T* y,
           std::int64_t y_stride, T* out, std::int64_t out_stride) {
  const T p = T(a), q = T(b);
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (rows * cols > (1 << 14))
  for (std::int64_t i = 0; i < rows; ++i) {
    const T *u = x + i * x_stride, *w = y == nullptr ? nullptr : y + i * y_stride;
    T* to = out + i * out_stride;
    if (w == nullptr) for (std::int64_t j = 0; j < cols; ++j) to[j] = p * u[j];
    else for (std::int64_t j = 0; j < cols; ++j) to[j] = p * u[j] + q * w[j];
  }
}

template <class T>
void normalize(Context& ctx, std::int64_t n, T* x, double least) {
  constexpr std::int64_t part = 4096;
  const std::int64_t parts = (n + part - 1) / part;
  std::vector<double> squares(static_cast<std::size_t>(parts));
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (parts > 4)
  for (std::int64_t b = 0; b < parts; ++b) {
    double sum = 0;
    for (std::int64_t i = b * part; i < std::min(n, (b + 1) * part); ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    squares[static_cast<std::size_t>(b)] = sum;
  }
  double total = 0;
  for (const double s : squares) total += s;
  const T scale = T(1 / std::max(std::sqrt(total), least));
  for_ranges(ctx, n, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) x[i] *= scale;
  });
}

double sum_of_squares(Context& ctx, std::span<const Piece> pieces) {
  constexpr std::int64_t part = 65536;
  double total = 0;
  std::vector<double> partial;
  for (const Piece& piece : pieces) {
    const std::int64_t blocks = (piece.count + part - 1) / part;
    partial.assign(static_cast<std::size_t>(blocks), 0);
    auto sum = [&]<class T>(const T* g) {
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (blocks > 1)
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = b * part, end = std::min(piece.count, begin + part);
        double lanes[16] = {};  // fixed lanes, so that the compiler may use vectors without choosing an order
        std::int64_t i = begin;
        for (; i + 16 <= end; i += 16)
          for (std::int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<double>(g[i + l]) * static_cast<double>(g[i + l]);
        for (; i < end; ++i) lanes[(i - begin) & 15] += static_cast<double>(g[i]) * static_cast<double>(g[i]);
        double s = 0;
        for (double x : lanes) s += x;
        partial[static_cast<std::size_t>(b)] = s;
      }
    };
    if (piece.num == Num::f64) sum(static_cast<const double*>(piece.data));
    else if (piece.num == Num::f32) sum(static_cast<const float*>(piece.data));
    else throw std::invalid_argument("[sum_of_squares] expected f32 or f64");
    for (double x : partial) total += x;
  }
  return total;
}

std::int64_t first_nonfinite(Context&, std::span<const Piece> pieces) {
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    bool finite = true;
    auto look = [&]<class T>(const T* g) {
      for (std::int64_t k = 0; k < pieces[p].count; ++k) finite &= std::isfinite(g[k]);
    };
    if (pieces[p].num == Num::f64) look(static_cast<const double*>(pieces[p].data));
    else look(static_cast<const float*>(pieces[p].data));
    if (!finite) return static_cast<std::int64_t>(p);
  }
  return -1;
}

#define INSTANTIATE(T, S)                                                                                            \
  template void adamw(Context&, const AdamWStep&, std::int64_t, T*, const T*, S*, S*);                               \
  template void sgd(Context&, const SgdStep&, std::int64_t, T*, const T*, S*);                                       \
  template void momentum(Context&, const MomentumStep&, std::int64_t, std::int64_t, std::int64_t, const T*, S*, T*);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(double, float)
#undef INSTANTIATE
#define INSTANTIATE(T)                                                                                                               \
  template void axpby(Context&, std::int64_t, std::int64_t, double, const T*, std::int64_t, double, const T*, std::int64_t, T*, std::int64_t); \
  template void normalize(Context&, std::int64_t, T*, double);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
