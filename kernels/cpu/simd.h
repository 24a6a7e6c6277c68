// defines: Vec<float> (16 lanes), Vec<double> (8 lanes), Mask, and their loads, stores, arithmetic,
// fixed-order reductions and element functions. AVX-512 where there is, AVX2 pairs or plain vector
// extensions elsewhere: the same bits on all of them. A row's tail is a masked vector, never a scalar
// loop, so that an element's rounding does not depend on where it lies.
#pragma once
#include <capstan/kernels/bf16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CAPSTAN_AVX512 1
#endif

#define CAPSTAN_INLINE inline __attribute__((always_inline))

namespace capstan::kernels::cpu {

/// What a row is computed in: f32 for f32 and bf16, f64 for f64.
template <class T> struct compute_of { using type = float; };
template <> struct compute_of<double> { using type = double; };
template <class T> using Compute = typename compute_of<T>::type;

/// How many lanes a load or store touches: all, or the first n.
struct Full {};
struct Part { int n; };

template <class T> struct Vec;
template <class T> struct Mask;

namespace detail {
typedef float F32x16 __attribute__((vector_size(64)));
typedef std::int32_t I32x16 __attribute__((vector_size(64)));
typedef std::uint32_t U32x16 __attribute__((vector_size(64)));
typedef std::uint16_t U16x16 __attribute__((vector_size(32)));
typedef double F64x8 __attribute__((vector_size(64)));
typedef std::int64_t I64x8 __attribute__((vector_size(64)));

#if defined(CAPSTAN_AVX512)
// The zero-masking forms with every lane on are the plain instructions; the plain intrinsics of GCC 12 read
// an undefined register, and warn about it.
constexpr __mmask16 all16 = 0xffff;
constexpr __mmask8 all8 = 0xff;
CAPSTAN_INLINE __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
CAPSTAN_INLINE __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
#endif

// bf16 is the upper half of a float; rounding to nearest even works on the bits and keeps denormals,
// which the hardware conversion flushes.
CAPSTAN_INLINE U16x16 narrow_to_bf16(F32x16 f) {
  const U32x16 u = reinterpret_cast<U32x16>(f);
  const U32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32x16 quiet = (u >> 16) | 0x40u;
  const U32x16 r = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
#if defined(CAPSTAN_AVX512)
  return reinterpret_cast<U16x16>(_mm512_maskz_cvtepi32_epi16(all16, reinterpret_cast<__m512i>(r)));
#else
  return __builtin_convertvector(r, U16x16);
#endif
}
CAPSTAN_INLINE F32x16 widen_bf16(U16x16 h) {
#if defined(CAPSTAN_AVX512)
  const U32x16 u = reinterpret_cast<U32x16>(_mm512_maskz_cvtepu16_epi32(all16, reinterpret_cast<__m256i>(h)));
#else
  const U32x16 u = __builtin_convertvector(h, U32x16);
#endif
  return reinterpret_cast<F32x16>(u << 16);
}
}  // namespace detail

/// One truth value per lane.
template <> struct Mask<float> {
  detail::I32x16 v;
  CAPSTAN_INLINE Mask operator&(Mask o) const { return {v & o.v}; }
  CAPSTAN_INLINE Mask operator|(Mask o) const { return {v | o.v}; }
};
template <> struct Mask<double> {
  detail::I64x8 v;
  CAPSTAN_INLINE Mask operator&(Mask o) const { return {v & o.v}; }
  CAPSTAN_INLINE Mask operator|(Mask o) const { return {v | o.v}; }
};

template <> struct Vec<float> {
  using Scalar = float;
  static constexpr int lanes = 16;
  detail::F32x16 v;

  Vec() = default;
  CAPSTAN_INLINE Vec(detail::F32x16 x) : v(x) {}
  CAPSTAN_INLINE Vec(float x) : v(x - detail::F32x16{}) {}  // x - 0 is x for every x, -0 included
  static CAPSTAN_INLINE Vec broadcast(float x) { return Vec(x); }

  static CAPSTAN_INLINE Vec load(const float* p, Full = {}) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static CAPSTAN_INLINE Vec load(const bf16* p, Full = {}) {
    detail::U16x16 h;
    std::memcpy(&h, p, sizeof h);
    return detail::widen_bf16(h);
  }
  CAPSTAN_INLINE void store(float* p, Full = {}) const { std::memcpy(p, &v, sizeof v); }
  CAPSTAN_INLINE void store(bf16* p, Full = {}) const {
    const detail::U16x16 h = detail::narrow_to_bf16(v);
    std::memcpy(static_cast<void*>(p), &h, sizeof h);
  }
  /// The first n lanes from memory, `fill` in the rest; touches no byte past them. 0 <= n <= 16.
  static CAPSTAN_INLINE Vec load_partial(const float* p, int n, float fill = 0) {
#if defined(CAPSTAN_AVX512)
    return Vec(reinterpret_cast<detail::F32x16>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), detail::first16(n), p)));
#else
    Vec r(fill);
    std::memcpy(&r.v, p, static_cast<std::size_t>(n) * sizeof(float));
    return r;
#endif
  }
  static CAPSTAN_INLINE Vec load_partial(const bf16* p, int n, float fill = 0) {
    detail::U16x16 h{};
#if defined(CAPSTAN_AVX512)
    h = reinterpret_cast<detail::U16x16>(_mm256_maskz_loadu_epi16(detail::first16(n), p));
    const detail::F32x16 wide = detail::widen_bf16(h);
    return Vec(reinterpret_cast<detail::F32x16>(
        _mm512_mask_mov_ps(_mm512_set1_ps(fill), detail::first16(n), reinterpret_cast<__m512>(wide))));
#else
    std::memcpy(&h, p, static_cast<std::size_t>(n) * sizeof(bf16));
    Vec r = detail::widen_bf16(h);
    for (int i = n; i < lanes; ++i) r.v[i] = fill;
    return r;
#endif
  }
  CAPSTAN_INLINE void store_partial(float* p, int n) const {
#if defined(CAPSTAN_AVX512)
    _mm512_mask_storeu_ps(p, detail::first16(n), reinterpret_cast<__m512>(v));
#else
    std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
#endif
  }
  CAPSTAN_INLINE void store_partial(bf16* p, int n) const {
    const detail::U16x16 h = detail::narrow_to_bf16(v);
#if defined(CAPSTAN_AVX512)
    _mm256_mask_storeu_epi16(p, detail::first16(n), reinterpret_cast<__m256i>(h));
#else
    std::memcpy(static_cast<void*>(p), &h, static_cast<std::size_t>(n) * sizeof(bf16));
#endif
  }
  template <class T> static CAPSTAN_INLINE Vec load(const T* p, Part m) { return load_partial(p, m.n); }
  template <class T> CAPSTAN_INLINE void store(T* p, Part m) const { store_partial(p, m.n); }

  CAPSTAN_INLINE float operator[](int i) const { return v[i]; }
  CAPSTAN_INLINE Vec operator-() const { return Vec(-v); }
  friend CAPSTAN_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend CAPSTAN_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend CAPSTAN_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend CAPSTAN_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend CAPSTAN_INLINE Mask<float> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend CAPSTAN_INLINE Mask<float> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend CAPSTAN_INLINE Mask<float> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend CAPSTAN_INLINE Mask<float> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend CAPSTAN_INLINE Mask<float> operator==(Vec a, Vec b) { return {a.v == b.v}; }
};

template <> struct Vec<double> {
  using Scalar = double;
  static constexpr int lanes = 8;
  detail::F64x8 v;

  Vec() = default;
  CAPSTAN_INLINE Vec(detail::F64x8 x) : v(x) {}
  CAPSTAN_INLINE Vec(double x) : v(x - detail::F64x8{}) {}
  static CAPSTAN_INLINE Vec broadcast(double x) { return Vec(x); }

  static CAPSTAN_INLINE Vec load(const double* p, Full = {}) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  CAPSTAN_INLINE void store(double* p, Full = {}) const { std::memcpy(p, &v, sizeof v); }
  static CAPSTAN_INLINE Vec load_partial(const double* p, int n, double fill = 0) {
#if defined(CAPSTAN_AVX512)
    return Vec(reinterpret_cast<detail::F64x8>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), detail::first8(n), p)));
#else
    Vec r(fill);
    std::memcpy(&r.v, p, static_cast<std::size_t>(n) * sizeof(double));
    return r;
#endif
  }
  CAPSTAN_INLINE void store_partial(double* p, int n) const {
#if defined(CAPSTAN_AVX512)
    _mm512_mask_storeu_pd(p, detail::first8(n), reinterpret_cast<__m512d>(v));
#else
    std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(double));
#endif
  }
  static CAPSTAN_INLINE Vec load(const double* p, Part m) { return load_partial(p, m.n); }
  CAPSTAN_INLINE void store(double* p, Part m) const { store_partial(p, m.n); }

  CAPSTAN_INLINE double operator[](int i) const { return v[i]; }
  CAPSTAN_INLINE Vec operator-() const { return Vec(-v); }
  friend CAPSTAN_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend CAPSTAN_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend CAPSTAN_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend CAPSTAN_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend CAPSTAN_INLINE Mask<double> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend CAPSTAN_INLINE Mask<double> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend CAPSTAN_INLINE Mask<double> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend CAPSTAN_INLINE Mask<double> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend CAPSTAN_INLINE Mask<double> operator==(Vec a, Vec b) { return {a.v == b.v}; }
};

/// yes where the mask holds, no elsewhere.
CAPSTAN_INLINE Vec<float> select(Mask<float> m, Vec<float> yes, Vec<float> no) { return Vec<float>(m.v ? yes.v : no.v); }
CAPSTAN_INLINE Vec<double> select(Mask<double> m, Vec<double> yes, Vec<double> no) { return Vec<double>(m.v ? yes.v : no.v); }

/// The second operand where either is NaN.
template <class T> CAPSTAN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) { return select(a > b, a, b); }
template <class T> CAPSTAN_INLINE Vec<T> min(Vec<T> a, Vec<T> b) { return select(a < b, a, b); }

/// a * b + c, rounded once.
CAPSTAN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<detail::F32x16>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a.v), reinterpret_cast<__m512>(b.v), reinterpret_cast<__m512>(c.v))));
#elif defined(__FMA__)
  union Halves { detail::F32x16 all; __m256 half[2]; } x{a.v}, y{b.v}, z{c.v};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return Vec<float>(z.all);
#else
  Vec<float> r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#endif
}
CAPSTAN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(CAPSTAN_AVX512)
  return Vec<double>(reinterpret_cast<detail::F64x8>(_mm512_fmadd_pd(
      reinterpret_cast<__m512d>(a.v), reinterpret_cast<__m512d>(b.v), reinterpret_cast<__m512d>(c.v))));
#elif defined(__FMA__)
  union Halves { detail::F64x8 all; __m256d half[2]; } x{a.v}, y{b.v}, z{c.v};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_pd(x.half[i], y.half[i], z.half[i]);
  return Vec<double>(z.all);
#else
  Vec<double> r;
  for (int i = 0; i < 8; ++i) r.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
  return r;
#endif
}

CAPSTAN_INLINE Vec<float> sqrt(Vec<float> a) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<detail::F32x16>(_mm512_maskz_sqrt_ps(detail::all16, reinterpret_cast<__m512>(a.v))));
#else
  Vec<float> r;
  for (int i = 0; i < 16; ++i) r.v[i] = __builtin_sqrtf(a.v[i]);
  return r;
#endif
}
CAPSTAN_INLINE Vec<double> sqrt(Vec<double> a) {
#if defined(CAPSTAN_AVX512)
  return Vec<double>(reinterpret_cast<detail::F64x8>(_mm512_maskz_sqrt_pd(detail::all8, reinterpret_cast<__m512d>(a.v))));
#else
  Vec<double> r;
  for (int i = 0; i < 8; ++i) r.v[i] = __builtin_sqrt(a.v[i]);
  return r;
#endif
}
CAPSTAN_INLINE Vec<float> abs(Vec<float> a) {
  return Vec<float>(reinterpret_cast<detail::F32x16>(reinterpret_cast<detail::I32x16>(a.v) & 0x7fffffff));
}
CAPSTAN_INLINE Vec<double> abs(Vec<double> a) {
  return Vec<double>(reinterpret_cast<detail::F64x8>(reinterpret_cast<detail::I64x8>(a.v) & 0x7fffffffffffffffll));
}

namespace detail {
typedef float F32x8 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef double F64x4 __attribute__((vector_size(32)));
typedef double F64x2 __attribute__((vector_size(16)));
// The upper half of the lanes meets the lower half until one is left: lane i with i + 8, then 4, 2, 1.
template <class F> CAPSTAN_INLINE float fold(Vec<float> a, F f) {
  const F32x8 e = f(__builtin_shufflevector(a.v, a.v, 0, 1, 2, 3, 4, 5, 6, 7),
                    __builtin_shufflevector(a.v, a.v, 8, 9, 10, 11, 12, 13, 14, 15));
  const F32x4 q = f(__builtin_shufflevector(e, e, 0, 1, 2, 3), __builtin_shufflevector(e, e, 4, 5, 6, 7));
  const F32x4 d = f(q, __builtin_shufflevector(q, q, 2, 3, 2, 3));
  return f(d, __builtin_shufflevector(d, d, 1, 1, 1, 1))[0];
}
template <class F> CAPSTAN_INLINE double fold(Vec<double> a, F f) {
  const F64x4 q = f(__builtin_shufflevector(a.v, a.v, 0, 1, 2, 3), __builtin_shufflevector(a.v, a.v, 4, 5, 6, 7));
  const F64x2 d = f(__builtin_shufflevector(q, q, 0, 1), __builtin_shufflevector(q, q, 2, 3));
  return f(d, __builtin_shufflevector(d, d, 1, 1))[0];
}
}  // namespace detail

/// Sum of the lanes in a fixed tree.
template <class T> CAPSTAN_INLINE T reduce_add(Vec<T> a) { return detail::fold(a, [](auto x, auto y) { return x + y; }); }
#if defined(CAPSTAN_AVX512)
CAPSTAN_INLINE float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(a.v)); }
#endif
template <class T> CAPSTAN_INLINE T reduce_max(Vec<T> a) { return detail::fold(a, [](auto x, auto y) { return x > y ? x : y; }); }
template <class T> CAPSTAN_INLINE T reduce_min(Vec<T> a) { return detail::fold(a, [](auto x, auto y) { return x < y ? x : y; }); }

namespace detail {
CAPSTAN_INLINE Vec<float> round_to_int(Vec<float> a) {  // |a| < 2^22; ties to even
  const Vec<float> magic(12582912.f);                   // 1.5 * 2^23
  return (a + magic) - magic;
}
CAPSTAN_INLINE I32x16 to_int(Vec<float> a) {  // integral a
  return __builtin_convertvector(a.v, I32x16);
}
CAPSTAN_INLINE Vec<float> to_float(I32x16 a) {
  return Vec<float>(__builtin_convertvector(a, F32x16));
}
// a * 2^n, rounded once. n in [-160, 130].
CAPSTAN_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<F32x16>(_mm512_maskz_scalef_ps(all16, reinterpret_cast<__m512>(a.v),
                                                                     reinterpret_cast<__m512>(n.v))));
#else
  const I32x16 k = to_int(n), first = k >> 1, second = k - first;
  const Vec<float> f(reinterpret_cast<F32x16>((first + 127) << 23)), s(reinterpret_cast<F32x16>((second + 127) << 23));
  return (a * f) * s;
#endif
}
template <class F> CAPSTAN_INLINE Vec<double> each_lane(Vec<double> a, F f) {
  double x[8];
  std::memcpy(x, &a.v, sizeof x);
  for (double& e : x) e = f(e);
  return Vec<double>::load(x);
}
}  // namespace detail

/// e^a, within 1 ulp; gradual below 2^-126; 0 at -inf, inf at +inf, NaN at NaN.
CAPSTAN_INLINE Vec<float> exp(Vec<float> a) {
  using V = Vec<float>;
  const V x = min(V(90.f), max(V(-105.f), a));  // the order keeps a NaN
  const V n = detail::round_to_int(x * V(1.44269504088896341f));
  V r = fma(n, V(-0.693359375f), x);  // ln 2 in two parts; the first has 9 bits, so n times it is exact
  r = fma(n, V(2.12194440054690583e-4f), r);
  // e^r = 1 + r + r^2 P(r) on |r| <= ln(2)/2: minimax in relative error, 3.3e-9.
  V p = fma(V(0.00138131422661f), r, V(0.00836941880229f));
  p = fma(p, r, V(0.0416684568194f));
  p = fma(p, r, V(0.166665147919f));
  p = fma(p, r, V(0.499999930507f));
  p = fma(p, r * r, r) + V(1.f);
  return detail::scale2(p, n);
}
CAPSTAN_INLINE Vec<double> exp(Vec<double> a) { return detail::each_lane(a, [](double x) { return std::exp(x); }); }

/// e^a with results below e^-87 made 0: for softmax, where they vanish beside 1 and denormal lanes would cost
/// a hundred times the others.
CAPSTAN_INLINE Vec<float> exp_flushed(Vec<float> a) {
  const Vec<float> lowest(-87.f);
  return select(a < lowest, Vec<float>(0.f), exp(max(a, lowest)));
}
CAPSTAN_INLINE Vec<double> exp_flushed(Vec<double> a) { return exp(a); }

/// Natural logarithm, within 2 ulp; -inf at 0, inf at inf, NaN below 0 and at NaN.
CAPSTAN_INLINE Vec<float> log(Vec<float> a) {
  using V = Vec<float>;
  const Mask<float> tiny = a < V(std::numeric_limits<float>::min());
  const V x = select(tiny, a * V(8388608.f), a);  // denormals times 2^23
  const detail::I32x16 bits = reinterpret_cast<detail::I32x16>(x.v);
  // Splits x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const detail::I32x16 shifted = bits - 0x3f3504f3;
  const detail::I32x16 e_bits = shifted >> 23;
  const V e = detail::to_float(e_bits) + select(tiny, V(-23.f), V(0.f));
  const V m(reinterpret_cast<detail::F32x16>((shifted & 0x007fffff) + 0x3f3504f3));
  const V f = m - V(1.f), z = f * f;
  // log(1 + f) = f - f^2/2 + f^3 P(f): minimax weighted by f^2, 7.3e-10.
  V p = fma(V(0.0691558081164f), f, V(-0.117898789487f));
  p = fma(p, f, V(0.118729159102f));
  p = fma(p, f, V(-0.1238433226f));
  p = fma(p, f, V(0.142186647486f));
  p = fma(p, f, V(-0.166692520008f));
  p = fma(p, f, V(0.200022262824f));
  p = fma(p, f, V(-0.249999865727f));
  p = fma(p, f, V(0.333333104459f));
  V r = p * f * z;
  r = fma(e, V(-2.12194440054690583e-4f), r);
  r = fma(V(-0.5f), z, r);
  r = fma(e, V(0.693359375f), f + r);
  const V inf(std::numeric_limits<float>::infinity());
  r = select(a == V(0.f), -inf, r);
  r = select(a < V(0.f), V(std::numeric_limits<float>::quiet_NaN()), r);
  return select(a < inf, r, a + V(0.f));  // inf stays, NaN stays
}
CAPSTAN_INLINE Vec<double> log(Vec<double> a) { return detail::each_lane(a, [](double x) { return std::log(x); }); }

/// 1 / (1 + e^-a), within 2 ulp on both sides: no cancellation for large negative a.
template <class T> CAPSTAN_INLINE Vec<T> sigmoid(Vec<T> a) {
  const Vec<T> one(T(1)), z = exp(-abs(a));
  return select(a >= Vec<T>(T(0)), one, z) / (one + z);
}

/// Hyperbolic tangent, within 2 ulp; keeps the sign of zero.
CAPSTAN_INLINE Vec<float> tanh(Vec<float> a) {
  using V = Vec<float>;
  const V x = abs(a), z = x * x;
  // tanh(x) = x + x^3 P(x^2) for x < 0.625: minimax, 2.4e-10.
  V p = fma(V(0.00207102340653f), z, V(-0.00809918097599f));
  p = fma(p, z, V(0.0216693633328f));
  p = fma(p, z, V(-0.0539411295529f));
  p = fma(p, z, V(0.133331624742f));
  p = fma(p, z, V(-0.333333297317f));
  const V small = fma(p * z, x, x);
  const V large = V(1.f) - V(2.f) / (exp(x + x) + V(1.f));
  const V r = select(x < V(0.625f), small, large);
  const detail::I32x16 sign = reinterpret_cast<detail::I32x16>(a.v) & static_cast<std::int32_t>(0x80000000u);
  return V(reinterpret_cast<detail::F32x16>(reinterpret_cast<detail::I32x16>(r.v) | sign));
}
CAPSTAN_INLINE Vec<double> tanh(Vec<double> a) { return detail::each_lane(a, [](double x) { return std::tanh(x); }); }

/// Calls f(i, Full{}) for each whole block of lanes of a row of n and f(i, Part{rest}) for its tail.
template <class T, class F> CAPSTAN_INLINE void for_blocks(std::int64_t n, F f) {
  std::int64_t i = 0;
  for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) f(i, Full{});
  if (i < n) f(i, Part{static_cast<int>(n - i)});
}

/// Sum over a row of n of the blocks f(i, Full or Part) (masked lanes must be 0). Four accumulators hide
/// the add's latency; the order depends on n alone.
template <class T, class F> CAPSTAN_INLINE T sum_blocks(std::int64_t n, F f) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> a(T(0)), b(T(0)), c(T(0)), d(T(0));
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = a + f(i, Full{}), b = b + f(i + lanes, Full{});
    c = c + f(i + 2 * lanes, Full{}), d = d + f(i + 3 * lanes, Full{});
  }
  for (; i + lanes <= n; i += lanes) a = a + f(i, Full{});
  if (i < n) b = b + f(i, Part{static_cast<int>(n - i)});
  return reduce_add((a + b) + (c + d));
}

}  // namespace capstan::kernels::cpu
