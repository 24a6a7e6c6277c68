// Reductions over one dimension and over all.
#include <kernels/cpu/reduce.h>
#include <kernels/cpu/rows.h>

#include <vector>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t block_rows = 64;
constexpr std::int64_t strip = 64;  // columns that one task of a column reduction takes

// Calls f(o, column begin, column end) for strips of columns of each outer index.
template <class F>
void strips(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, F f) {
  const std::int64_t per = (inner + strip - 1) / strip;
  parallel_ranges(ctx, outer * per, row_grain(n * (inner < strip ? inner : strip)), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t first = task % per * strip;
      f(task / per, first, first + strip < inner ? first + strip : inner);
    }
  });
}

}  // namespace

template <class T, class Out>
void sum_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, Compute<T> factor, Out* out) {
  using C = Compute<T>;
  using V = Vec<C>;
  if (inner == 1) {
    parallel_ranges(ctx, outer, row_grain(n), [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t o = begin; o < end; ++o)
        out[o] = Out(factor * sum_blocks<C>(n, [row = a + o * n](std::int64_t i, auto m) { return V::load(row + i, m); }));
    });
    return;
  }
  strips(ctx, outer, n, inner, [=](std::int64_t o, std::int64_t first, std::int64_t last) {
    const T* from = a + o * n * inner;
    for_blocks<C>(last - first, [=](std::int64_t i, auto m) {
      V total(C(0));
      for (std::int64_t block = 0; block < n; block += block_rows) {
        const std::int64_t end = block + block_rows < n ? block + block_rows : n;
        V part(C(0));
        for (std::int64_t j = block; j < end; ++j) part = part + V::load(from + j * inner + first + i, m);
        total = total + part;
      }
      (total * V(factor)).store(out + o * inner + first + i, m);
    });
  });
}

template <class T>
void spread_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* g, Compute<T> factor, T* out) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_ranges(ctx, outer * n, row_grain(inner), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* from = g + r / n * inner;
      T* to = out + r * inner;
      for_blocks<C>(inner, [=](std::int64_t i, auto m) { (V::load(from + i, m) * V(factor)).store(to + i, m); });
    }
  });
}

template <class T>
void max_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, T* out) {
  using C = Compute<T>;
  strips(ctx, outer, n, inner, [=](std::int64_t o, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const T* column = a + o * n * inner + i;
      T best = column[0];
      for (std::int64_t j = 1; j < n; ++j) {
        const C x = static_cast<C>(column[j * inner]);
        if (x > static_cast<C>(best) || x != x) best = column[j * inner];
      }
      out[o * inner + i] = best;
    }
  });
}

template <class T>
void max_middle_backward(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, const T* m,
                         const T* g, T* da) {
  using C = Compute<T>;
  strips(ctx, outer, n, inner, [=](std::int64_t o, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t base = o * n * inner + i;
      const C best = static_cast<C>(m[o * inner + i]);
      bool given = false;
      for (std::int64_t j = 0; j < n; ++j) {
        const bool here = !given && static_cast<C>(a[base + j * inner]) == best;
        da[base + j * inner] = here ? g[o * inner + i] : T(C(0));
        given |= here;
      }
    }
  });
}

template <class T>
void scan_middle(Context& ctx, std::int64_t outer, std::int64_t n, std::int64_t inner, const T* a, bool reverse, T* out) {
  using C = Compute<T>;
  using V = Vec<C>;
  strips(ctx, outer, n, inner, [=](std::int64_t o, std::int64_t first, std::int64_t last) {
    const std::int64_t step = reverse ? -inner : inner, begin = o * n * inner + (reverse ? (n - 1) * inner : 0) + first;
    if (last - first == 1) {
      C sum = 0;
      for (std::int64_t j = 0, at = begin; j < n; ++j, at += step) out[at] = T(sum += static_cast<C>(a[at]));
      return;
    }
    for_blocks<C>(last - first, [=](std::int64_t i, auto m) {
      V sum(C(0));
      for (std::int64_t j = 0, at = begin + i; j < n; ++j, at += step) {
        sum = sum + V::load(a + at, m);
        sum.store(out + at, m);
      }
    });
  });
}

template <class T>
Compute<T> sum_flat(Context& ctx, std::int64_t n, const T* a) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr std::int64_t block = 4096;
  const std::int64_t blocks = (n + block - 1) / block;
  std::vector<C> sums(static_cast<std::size_t>(blocks));
  C* to = sums.data();
  parallel_ranges(ctx, blocks, 4, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const T* from = a + k * block;
      const std::int64_t count = n - k * block < block ? n - k * block : block;
      to[k] = sum_blocks<C>(count, [=](std::int64_t i, auto m) { return V::load(from + i, m); });
    }
  });
  return sum_blocks<C>(blocks, [=](std::int64_t i, auto m) { return V::load(to + i, m); });
}

#define INSTANTIATE(T)                                                                                                        \
  template void sum_middle(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, Compute<T>, T*);                    \
  template void spread_middle(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, Compute<T>, T*);                 \
  template void max_middle(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, T*);                                \
  template void max_middle_backward(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, const T*, const T*, T*);   \
  template void scan_middle(Context&, std::int64_t, std::int64_t, std::int64_t, const T*, bool, T*);                         \
  template Compute<T> sum_flat(Context&, std::int64_t, const T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE
template void sum_middle(Context&, std::int64_t, std::int64_t, std::int64_t, const bf16*, float, float*);

}  // namespace capstan::kernels::cpu
