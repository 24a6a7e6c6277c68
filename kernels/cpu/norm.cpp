// Norms over rows. A row is swept again while it is in the first-level cache: memory sees it once.
#include <kernels/cpu/norm.h>
#include <kernels/cpu/rows.h>

#include <cmath>
#include <cstring>

namespace capstan::kernels::cpu {

std::int64_t norm_block_rows(std::int64_t rows) {
  const std::int64_t least = (rows + 255) / 256;
  return least <= 64 ? 64 : (least + 63) / 64 * 64;
}

namespace {

template <class T> const T* in(const void* p) { return static_cast<const T*>(p); }
template <class T> T* out(void* p) { return static_cast<T*>(p); }

/// Row r of what is normalized: of x, or of the sum, which is made here.
template <class T>
const T* normalized_row(const NormRows& n, std::int64_t r) {
  using V = Vec<Compute<T>>;
  const T* x = in<T>(n.x) + r * n.cols;
  if (n.residual == nullptr) return x;
  const T* residual = in<T>(n.residual) + r * n.cols;
  T* sum = out<T>(n.sum) + r * n.cols;
  for_blocks<Compute<T>>(n.cols, [=](std::int64_t i, auto m) { (V::load(x + i, m) + V::load(residual + i, m)).store(sum + i, m); });
  return sum;
}

template <class T>
void rms_norm_row(const NormRows& n, std::int64_t r) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* x = normalized_row<T>(n, r);
  const C* w = in<C>(n.w);
  T* y = out<T>(n.y) + r * n.cols;
  const C squares = sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
    const V v = V::load(x + i, m);
    return v * v;
  });
  const C inv = C(1) / std::sqrt(squares / static_cast<C>(n.cols) + static_cast<C>(n.epsilon));
  out<C>(n.inverse)[r] = inv;
  for_blocks<C>(n.cols, [=](std::int64_t i, auto m) { (V::load(x + i, m) * V(inv) * V::load(w + i, m)).store(y + i, m); });
}

template <class T>
void layer_norm_row(const NormRows& n, std::int64_t r) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* x = normalized_row<T>(n, r);
  const C *w = in<C>(n.w), *b = in<C>(n.b);
  T* y = out<T>(n.y) + r * n.cols;
  const C mean = sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) { return V::load(x + i, m); }) / static_cast<C>(n.cols);
  const V centre(mean);
  const C squares = sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
    if constexpr (std::is_same_v<decltype(m), Part>) {
      const V d = V::load_partial(x + i, m.n, mean) - centre;  // masked lanes become 0 (bf16 rows fill in f32)
      return d * d;
    } else {
      const V d = V::load(x + i, m) - centre;
      return d * d;
    }
  });
  const C inv = C(1) / std::sqrt(squares / static_cast<C>(n.cols) + static_cast<C>(n.epsilon));
  out<C>(n.mean)[r] = mean, out<C>(n.inverse)[r] = inv;
  const V by(inv);
  if (b)
    for_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
      fma((V::load(x + i, m) - centre) * by, V::load(w + i, m), V::load(b + i, m)).store(y + i, m);
    });
  else
    for_blocks<C>(n.cols, [=](std::int64_t i, auto m) { ((V::load(x + i, m) - centre) * by * V::load(w + i, m)).store(y + i, m); });
}

/// Row r: adds to dw and db [cols] where they are not null, and writes dx where it is wanted.
template <class T>
void rms_norm_backward_row(const NormRowsBackward& n, std::int64_t r, Compute<T>* dw) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T *x = in<T>(n.x) + r * n.cols, *g = in<T>(n.g) + r * n.cols;
  const C* w = in<C>(n.w);
  const V inv(in<C>(n.inverse)[r]);
  if (n.dx == nullptr) {
    for_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
      fma(V::load(g + i, m), V::load(x + i, m) * inv, V::load(dw + i, m)).store(dw + i, m);
    });
    return;
  }
  const C dot = sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
    return V::load(g + i, m) * V::load(w + i, m) * (V::load(x + i, m) * inv);
  });
  const V mean(dot / static_cast<C>(n.cols));
  T* dx = out<T>(n.dx) + r * n.cols;
  const T* more = n.g_sum != nullptr ? in<T>(n.g_sum) + r * n.cols : nullptr;
  for_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
    const V unit = V::load(x + i, m) * inv, grad = V::load(g + i, m);
    if (dw) fma(grad, unit, V::load(dw + i, m)).store(dw + i, m);
    const V d = inv * fma(-unit, mean, grad * V::load(w + i, m));
    (more ? d + V::load(more + i, m) : d).store(dx + i, m);
  });
}

template <class T>
void layer_norm_backward_row(const NormRowsBackward& n, std::int64_t r, Compute<T>* dw, Compute<T>* db) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T *x = in<T>(n.x) + r * n.cols, *g = in<T>(n.g) + r * n.cols;
  const C* w = in<C>(n.w);
  T* dx = n.dx != nullptr ? out<T>(n.dx) + r * n.cols : nullptr;
  const T* more = n.g_sum != nullptr ? in<T>(n.g_sum) + r * n.cols : nullptr;
  const V centre(in<C>(n.mean)[r]), inv(in<C>(n.inverse)[r]);
  V mean_g(C(0)), mean_gx(C(0));
  if (dx) {
    mean_g = V(sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) { return V::load(g + i, m) * V::load(w + i, m); }) / static_cast<C>(n.cols));
    mean_gx = V(sum_blocks<C>(n.cols, [=](std::int64_t i, auto m) {  // masked lanes: g w is 0
                  return V::load(g + i, m) * V::load(w + i, m) * ((V::load(x + i, m) - centre) * inv);
                }) /
                static_cast<C>(n.cols));
  }
  for_blocks<C>(n.cols, [=](std::int64_t i, auto m) {
    const V unit = (V::load(x + i, m) - centre) * inv, grad = V::load(g + i, m);
    if (dw) fma(grad, unit, V::load(dw + i, m)).store(dw + i, m);
    if (db) (grad + V::load(db + i, m)).store(db + i, m);
    if (!dx) return;
    const V d = inv * (fma(-unit, mean_gx, grad * V::load(w + i, m)) - mean_g);
    (more ? d + V::load(more + i, m) : d).store(dx + i, m);
  });
}

}  // namespace

template <class T>
void norm(Context& ctx, const NormRows& n) {
  parallel_ranges(ctx, n.rows, row_grain(n.cols), [&n](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) n.centre ? layer_norm_row<T>(n, r) : rms_norm_row<T>(n, r);
  });
}

template <class T>
void norm_backward(Context& ctx, const NormRowsBackward& n) {
  using C = Compute<T>;
  const std::int64_t block = norm_block_rows(n.rows), blocks = (n.rows + block - 1) / block;
  parallel_ranges(ctx, blocks, 1, [&n, block](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const auto cleared = [&](void* partial) -> C* {
        if (partial == nullptr) return nullptr;
        return static_cast<C*>(std::memset(out<C>(partial) + k * n.cols, 0, static_cast<std::size_t>(n.cols) * sizeof(C)));
      };
      C *dw = cleared(n.partial_w), *db = cleared(n.partial_b);
      const std::int64_t stop = (k + 1) * block < n.rows ? (k + 1) * block : n.rows;
      for (std::int64_t r = k * block; r < stop; ++r)
        n.centre ? layer_norm_backward_row<T>(n, r, dw, db) : rms_norm_backward_row<T>(n, r, dw);
    }
  });
}

#define INSTANTIATE(T)                                \
  template void norm<T>(Context&, const NormRows&); \
  template void norm_backward<T>(Context&, const NormRowsBackward&);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
