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

template <class T>
void rms_norm(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, const Compute<T>* w, double epsilon,
              T* y_all, Compute<T>* inverse) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* x = x_all + r * cols;
      T* y = y_all + r * cols;
      const C squares = sum_blocks<C>(cols, [=](std::int64_t i, auto m) {
        const V v = V::load(x + i, m);
        return v * v;
      });
      const C inv = C(1) / std::sqrt(squares / static_cast<C>(cols) + static_cast<C>(epsilon));
      inverse[r] = inv;
      for_blocks<C>(cols, [=](std::int64_t i, auto m) { (V::load(x + i, m) * V(inv) * V::load(w + i, m)).store(y + i, m); });
    }
  });
}

template <class T>
void rms_norm_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, const Compute<T>* w,
                       const Compute<T>* inverse, const T* g_all, T* dx_all, Compute<T>* partial) {
  using C = Compute<T>;
  using V = Vec<C>;
  const std::int64_t block = norm_block_rows(rows), blocks = (rows + block - 1) / block;
  parallel_ranges(ctx, blocks, 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      C* dw = partial ? partial + k * cols : nullptr;
      if (dw) std::memset(dw, 0, static_cast<std::size_t>(cols) * sizeof(C));
      const std::int64_t stop = (k + 1) * block < rows ? (k + 1) * block : rows;
      for (std::int64_t r = k * block; r < stop; ++r) {
        const T *x = x_all + r * cols, *g = g_all + r * cols;
        const V inv(inverse[r]);
        if (!dx_all) {
          for_blocks<C>(cols, [=](std::int64_t i, auto m) {
            fma(V::load(g + i, m), V::load(x + i, m) * inv, V::load(dw + i, m)).store(dw + i, m);
          });
          continue;
        }
        const C dot = sum_blocks<C>(cols, [=](std::int64_t i, auto m) {
          return V::load(g + i, m) * V::load(w + i, m) * (V::load(x + i, m) * inv);
        });
        const V mean(dot / static_cast<C>(cols));
        T* dx = dx_all + r * cols;
        for_blocks<C>(cols, [=](std::int64_t i, auto m) {
          const V unit = V::load(x + i, m) * inv, grad = V::load(g + i, m);
          if (dw) fma(grad, unit, V::load(dw + i, m)).store(dw + i, m);
          (inv * fma(-unit, mean, grad * V::load(w + i, m))).store(dx + i, m);
        });
      }
    }
  });
}

template <class T>
void layer_norm(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, const Compute<T>* w, const Compute<T>* b,
                double epsilon, T* y_all, Compute<T>* means, Compute<T>* inverse) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, rows, row_grain(cols), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* x = x_all + r * cols;
      T* y = y_all + r * cols;
      const C mean = sum_blocks<C>(cols, [=](std::int64_t i, auto m) { return V::load(x + i, m); }) / static_cast<C>(cols);
      const V centre(mean);
      const C squares = sum_blocks<C>(cols, [=](std::int64_t i, auto m) {
        if constexpr (std::is_same_v<decltype(m), Part>) {
          const V d = V::load_partial(x + i, m.n, mean) - centre;  // masked lanes become 0 (bf16 rows fill in f32)
          return d * d;
        } else {
          const V d = V::load(x + i, m) - centre;
          return d * d;
        }
      });
      const C inv = C(1) / std::sqrt(squares / static_cast<C>(cols) + static_cast<C>(epsilon));
      means[r] = mean, inverse[r] = inv;
      const V by(inv);
      if (b)
        for_blocks<C>(cols, [=](std::int64_t i, auto m) {
          fma((V::load(x + i, m) - centre) * by, V::load(w + i, m), V::load(b + i, m)).store(y + i, m);
        });
      else
        for_blocks<C>(cols, [=](std::int64_t i, auto m) {
          ((V::load(x + i, m) - centre) * by * V::load(w + i, m)).store(y + i, m);
        });
    }
  });
}

template <class T>
void layer_norm_backward(Context& ctx, std::int64_t rows, std::int64_t cols, const T* x_all, const Compute<T>* w,
                         const Compute<T>* means, const Compute<T>* inverse, const T* g_all, T* dx_all,
                         Compute<T>* partial_w, Compute<T>* partial_b) {
  using C = Compute<T>;
  using V = Vec<C>;
  const std::int64_t block = norm_block_rows(rows), blocks = (rows + block - 1) / block;
  parallel_ranges(ctx, blocks, 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      C *dw = partial_w ? partial_w + k * cols : nullptr, *db = partial_b ? partial_b + k * cols : nullptr;
      if (dw) std::memset(dw, 0, static_cast<std::size_t>(cols) * sizeof(C));
      if (db) std::memset(db, 0, static_cast<std::size_t>(cols) * sizeof(C));
      const std::int64_t stop = (k + 1) * block < rows ? (k + 1) * block : rows;
      for (std::int64_t r = k * block; r < stop; ++r) {
        const T *x = x_all + r * cols, *g = g_all + r * cols;
        T* dx = dx_all ? dx_all + r * cols : nullptr;
        const V centre(means[r]), inv(inverse[r]);
        V mean_g(C(0)), mean_gx(C(0));
        if (dx) {
          mean_g = V(sum_blocks<C>(cols, [=](std::int64_t i, auto m) { return V::load(g + i, m) * V::load(w + i, m); }) /
                     static_cast<C>(cols));
          mean_gx = V(sum_blocks<C>(cols, [=](std::int64_t i, auto m) {  // masked lanes: g w is 0
                        return V::load(g + i, m) * V::load(w + i, m) * ((V::load(x + i, m) - centre) * inv);
                      }) /
                      static_cast<C>(cols));
        }
        for_blocks<C>(cols, [=](std::int64_t i, auto m) {
          const V unit = (V::load(x + i, m) - centre) * inv, grad = V::load(g + i, m);
          if (dw) fma(grad, unit, V::load(dw + i, m)).store(dw + i, m);
          if (db) (grad + V::load(db + i, m)).store(db + i, m);
          if (dx) (inv * (fma(-unit, mean_gx, grad * V::load(w + i, m)) - mean_g)).store(dx + i, m);
        });
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                                     \
  template void rms_norm(Context&, std::int64_t, std::int64_t, const T*, const Compute<T>*, double, T*, Compute<T>*);     \
  template void rms_norm_backward(Context&, std::int64_t, std::int64_t, const T*, const Compute<T>*, const Compute<T>*,   \
                                  const T*, T*, Compute<T>*);                                                             \
  template void layer_norm(Context&, std::int64_t, std::int64_t, const T*, const Compute<T>*, const Compute<T>*, double,  \
                           T*, Compute<T>*, Compute<T>*);                                                                 \
  template void layer_norm_backward(Context&, std::int64_t, std::int64_t, const T*, const Compute<T>*, const Compute<T>*, \
                                    const Compute<T>*, const T*, T*, Compute<T>*, Compute<T>*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace capstan::kernels::cpu
