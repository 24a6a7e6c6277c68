// Broadcast + - * /: dimensions that both operands walk alike are merged, so that equal shapes are one
// flat loop and a bias is a loop over rows.
#include <kernels/cpu/binary.h>
#include <kernels/cpu/elementwise.h>
#include <kernels/shapes.h>

namespace capstan::kernels::cpu {

namespace {

// One stretch of the innermost dimension.
template <class T, class F>
void stretch(std::int64_t n, const T* a, std::int64_t sa, const T* b, std::int64_t sb, T* out, F f) {
  using C = Compute<T>;
  using V = Vec<C>;
  if (sa == 1 && sb == 1)
    return for_blocks<C>(n, [=](std::int64_t i, auto m) { f(V::load(a + i, m), V::load(b + i, m)).store(out + i, m); });
  if (sa == 1 && sb == 0) {
    const V y(static_cast<C>(*b));
    return for_blocks<C>(n, [=](std::int64_t i, auto m) { f(V::load(a + i, m), y).store(out + i, m); });
  }
  if (sa == 0 && sb == 1) {
    const V x(static_cast<C>(*a));
    return for_blocks<C>(n, [=](std::int64_t i, auto m) { f(x, V::load(b + i, m)).store(out + i, m); });
  }
  for (std::int64_t i = 0; i < n; ++i)
    out[i] = T(f(static_cast<C>(a[i * sa]), static_cast<C>(b[i * sb])));
}

template <class T, class F>
void walk(Context& ctx, const Broadcast& p, const T* a, const T* b, T* out, F f) {
  std::int64_t total = 1;
  for (int d = 0; d < p.rank; ++d) total *= p.shape[d];
  const int last = p.rank - 1;
  const std::int64_t inner = p.shape[last];
  parallel_ranges(ctx, total, elementwise_grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      std::int64_t row = begin / inner;
      const std::int64_t column = begin % inner;
      const std::int64_t n = inner - column < end - begin ? inner - column : end - begin;
      const T *x = a + column * p.a[last], *y = b + column * p.b[last];
      for (int d = last - 1; d >= 0; --d) {
        const std::int64_t i = row % p.shape[d];
        row /= p.shape[d];
        x += i * p.a[d], y += i * p.b[d];
      }
      stretch(n, x, p.a[last], y, p.b[last], out + begin, f);
      begin += n;
    }
  });
}

}  // namespace

template <class T>
void binary(Context& ctx, BinaryOp op, const Broadcast& plan, const T* a, const T* b, T* out) {
  const Broadcast p = merged(plan);
  switch (op) {
    case BinaryOp::add: return walk(ctx, p, a, b, out, [](auto x, auto y) { return x + y; });
    case BinaryOp::sub: return walk(ctx, p, a, b, out, [](auto x, auto y) { return x - y; });
    case BinaryOp::mul: return walk(ctx, p, a, b, out, [](auto x, auto y) { return x * y; });
    case BinaryOp::div: return walk(ctx, p, a, b, out, [](auto x, auto y) { return x / y; });
  }
}

template void binary(Context&, BinaryOp, const Broadcast&, const double*, const double*, double*);
template void binary(Context&, BinaryOp, const Broadcast&, const float*, const float*, float*);
template void binary(Context&, BinaryOp, const Broadcast&, const bf16*, const bf16*, bf16*);

}  // namespace capstan::kernels::cpu
