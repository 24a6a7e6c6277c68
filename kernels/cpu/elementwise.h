// defines: map1, map2: out[i] = f(a[i]), f(a[i], b[i]) over flat arrays; f works on vectors.
#pragma once
#include <kernels/cpu/rows.h>
#include <kernels/cpu/simd.h>

namespace capstan::kernels::cpu {

constexpr std::int64_t elementwise_grain = 16384;

/// `out` may be `a`. In and Out may differ in storage as long as they compute in the same type.
template <class In, class Out, class F>
void map1(Context& ctx, std::int64_t n, const In* a, Out* out, F f) {
  using V = Vec<Compute<In>>;
  parallel_ranges(ctx, n, elementwise_grain, [=](std::int64_t begin, std::int64_t end) {
    for_blocks<Compute<In>>(end - begin, [=](std::int64_t i, auto m) { f(V::load(a + begin + i, m)).store(out + begin + i, m); });
  });
}

template <class A, class B, class Out, class F>
void map2(Context& ctx, std::int64_t n, const A* a, const B* b, Out* out, F f) {
  using V = Vec<Compute<A>>;
  parallel_ranges(ctx, n, elementwise_grain, [=](std::int64_t begin, std::int64_t end) {
    for_blocks<Compute<A>>(end - begin, [=](std::int64_t i, auto m) {
      f(V::load(a + begin + i, m), V::load(b + begin + i, m)).store(out + begin + i, m);
    });
  });
}

}  // namespace capstan::kernels::cpu
