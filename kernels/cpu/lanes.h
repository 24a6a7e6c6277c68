// defines: what the lanes of Vec lie in: F32x16, I32x16, U32x16, U16x16, F64x8, I64x8, U64x8 with element-wise operators:
// one register of 64 bytes with AVX-512, two of 32 elsewhere. (A 64-byte vector type without such registers would go
// through memory at every operation.) And what operators alone do not say: bits(), convert(), choose(), splat(), loads and stores, halves.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CAPSTAN_AVX512 1
#endif

#define CAPSTAN_INLINE inline __attribute__((always_inline))

namespace capstan::kernels::cpu::detail {

typedef float F32x4 __attribute__((vector_size(16)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef double F64x2 __attribute__((vector_size(16)));
typedef double F64x4 __attribute__((vector_size(32)));

#if defined(CAPSTAN_AVX512)

typedef float F32x16 __attribute__((vector_size(64)));
typedef std::int32_t I32x16 __attribute__((vector_size(64)));
typedef std::uint32_t U32x16 __attribute__((vector_size(64)));
typedef std::uint16_t U16x16 __attribute__((vector_size(32)));
typedef double F64x8 __attribute__((vector_size(64)));
typedef std::int64_t I64x8 __attribute__((vector_size(64)));
typedef std::uint64_t U64x8 __attribute__((vector_size(64)));

/// The same bits as another type of lanes.
template <class To, class From> CAPSTAN_INLINE To bits(From x) { return reinterpret_cast<To>(x); }
/// Lane by lane, by value.
template <class To, class From> CAPSTAN_INLINE To convert(From x) { return __builtin_convertvector(x, To); }
/// yes where the mask's lane is not 0.
template <class M, class L> CAPSTAN_INLINE L choose(M m, L yes, L no) { return m ? yes : no; }
template <class L, class S> CAPSTAN_INLINE L splat(S x) { return x - L{}; }  // x - 0 is x for every x, -0 included
template <class L> CAPSTAN_INLINE L load_lanes(const void* p) {
  L x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class L> CAPSTAN_INLINE void store_lanes(void* p, L x) { std::memcpy(p, &x, sizeof x); }
CAPSTAN_INLINE F32x8 lower(F32x16 a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7); }
CAPSTAN_INLINE F32x8 upper(F32x16 a) { return __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15); }
CAPSTAN_INLINE F64x4 lower(F64x8 a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3); }
CAPSTAN_INLINE F64x4 upper(F64x8 a) { return __builtin_shufflevector(a, a, 4, 5, 6, 7); }

// The zero-masking forms with every lane on are the plain instructions; the plain intrinsics of GCC 12 read
// an undefined register, and warn about it.
constexpr __mmask16 all16 = 0xffff;
constexpr __mmask8 all8 = 0xff;
CAPSTAN_INLINE __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
CAPSTAN_INLINE __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

#else

typedef std::int32_t I32x8 __attribute__((vector_size(32)));
typedef std::uint32_t U32x8 __attribute__((vector_size(32)));
typedef std::uint16_t U16x8 __attribute__((vector_size(16)));
typedef std::int64_t I64x4 __attribute__((vector_size(32)));
typedef std::uint64_t U64x4 __attribute__((vector_size(32)));

template <class Half> struct Pair {
  Half lo, hi;
  static constexpr int half = sizeof(Half) / sizeof(Half{}[0]);
  CAPSTAN_INLINE auto operator[](int i) const { return i < half ? lo[i] : hi[i - half]; }
  CAPSTAN_INLINE Pair operator-() const { return {-lo, -hi}; }
};
#define CAPSTAN_LANES(op)                                                                                                    \
  template <class H> CAPSTAN_INLINE auto operator op(Pair<H> a, Pair<H> b) {                                                 \
    return Pair<decltype(a.lo op b.lo)>{a.lo op b.lo, a.hi op b.hi};                                                         \
  }                                                                                                                          \
  template <class H, class S> CAPSTAN_INLINE auto operator op(Pair<H> a, S b) {                                              \
    return Pair<decltype(a.lo op b)>{a.lo op b, a.hi op b};                                                                  \
  }
CAPSTAN_LANES(+)
CAPSTAN_LANES(-)
CAPSTAN_LANES(*)
CAPSTAN_LANES(/)
CAPSTAN_LANES(&)
CAPSTAN_LANES(|)
CAPSTAN_LANES(^)
CAPSTAN_LANES(<<)
CAPSTAN_LANES(>>)
CAPSTAN_LANES(<)
CAPSTAN_LANES(<=)
CAPSTAN_LANES(>)
CAPSTAN_LANES(>=)
CAPSTAN_LANES(==)
#undef CAPSTAN_LANES

using F32x16 = Pair<F32x8>;
using I32x16 = Pair<I32x8>;
using U32x16 = Pair<U32x8>;
using U16x16 = Pair<U16x8>;
using F64x8 = Pair<F64x4>;
using I64x8 = Pair<I64x4>;
using U64x8 = Pair<U64x4>;

template <class To, class H> CAPSTAN_INLINE To bits(Pair<H> x) {
  using T = decltype(To::lo);
  return {reinterpret_cast<T>(x.lo), reinterpret_cast<T>(x.hi)};
}
template <class To, class H> CAPSTAN_INLINE To convert(Pair<H> x) {
  using T = decltype(To::lo);
  return {__builtin_convertvector(x.lo, T), __builtin_convertvector(x.hi, T)};
}
template <class M, class H> CAPSTAN_INLINE Pair<H> choose(Pair<M> m, Pair<H> yes, Pair<H> no) {
  return {m.lo ? yes.lo : no.lo, m.hi ? yes.hi : no.hi};
}
template <class L, class S> CAPSTAN_INLINE L splat(S x) {
  using T = decltype(L::lo);
  return {x - T{}, x - T{}};
}
// By halves: a pair that is copied whole is kept in memory.
template <class L> CAPSTAN_INLINE L load_lanes(const void* p) {
  decltype(L::lo) lo, hi;
  std::memcpy(&lo, p, sizeof lo);
  std::memcpy(&hi, static_cast<const char*>(p) + sizeof lo, sizeof hi);
  return {lo, hi};
}
template <class H> CAPSTAN_INLINE void store_lanes(void* p, Pair<H> x) {
  std::memcpy(p, &x.lo, sizeof x.lo);
  std::memcpy(static_cast<char*>(p) + sizeof x.lo, &x.hi, sizeof x.hi);
}
template <class H> CAPSTAN_INLINE H lower(Pair<H> a) { return a.lo; }
template <class H> CAPSTAN_INLINE H upper(Pair<H> a) { return a.hi; }

#if defined(__AVX2__)
/// The first n of 8 lanes (n outside 0 .. 8 is taken for the nearest of the two), as masked loads and stores want them.
CAPSTAN_INLINE __m256i first_of_8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CAPSTAN_INLINE __m256i first_of_4(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
#endif

#endif

}  // namespace capstan::kernels::cpu::detail
