// defines: Vec<float> (16 lanes), Vec<double> (8 lanes), Mask, and their loads, stores, arithmetic,
// fixed-order reductions and element functions. AVX-512 where there is, pairs of half as wide vectors
// elsewhere (lanes.h): the same bits on all of them. A row's tail is a masked vector, never a scalar
// loop, so that an element's rounding does not depend on where it lies.
#pragma once
#include <capstan/kernels/bf16.h>
#include <kernels/cpu/lanes.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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
// bf16 is the upper half of a float; rounding to nearest even works on the bits and keeps denormals,
// which the hardware conversion flushes.
CAPSTAN_INLINE U16x16 narrow_to_bf16(F32x16 f) {
  const U32x16 u = bits<U32x16>(f);
  const U32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32x16 quiet = (u >> 16) | 0x40u;
  const U32x16 r = choose((u & 0x7fffffffu) > 0x7f800000u, quiet, rounded);
#if defined(CAPSTAN_AVX512)
  return reinterpret_cast<U16x16>(_mm512_maskz_cvtepi32_epi16(all16, reinterpret_cast<__m512i>(r)));
#elif defined(__AVX2__)
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(reinterpret_cast<__m256i>(r.lo), reinterpret_cast<__m256i>(r.hi)), 0xd8);
  return {reinterpret_cast<U16x8>(_mm256_castsi256_si128(both)), reinterpret_cast<U16x8>(_mm256_extracti128_si256(both, 1))};
#else
  return convert<U16x16>(r);
#endif
}
CAPSTAN_INLINE F32x16 widen_bf16(U16x16 h) {
#if defined(CAPSTAN_AVX512)
  const U32x16 u = reinterpret_cast<U32x16>(_mm512_maskz_cvtepu16_epi32(all16, reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  const U32x16 u{reinterpret_cast<U32x8>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h.lo))),
                 reinterpret_cast<U32x8>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h.hi)))};
#else
  const U32x16 u = convert<U32x16>(h);
#endif
  return bits<F32x16>(u << 16);
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
  CAPSTAN_INLINE Vec(float x) : v(detail::splat<detail::F32x16>(x)) {}
  static CAPSTAN_INLINE Vec broadcast(float x) { return Vec(x); }

  static CAPSTAN_INLINE Vec load(const float* p, Full = {}) { return Vec(detail::load_lanes<detail::F32x16>(p)); }
  static CAPSTAN_INLINE Vec load(const bf16* p, Full = {}) { return detail::widen_bf16(detail::load_lanes<detail::U16x16>(p)); }
  CAPSTAN_INLINE void store(float* p, Full = {}) const { detail::store_lanes(p, v); }
  CAPSTAN_INLINE void store(bf16* p, Full = {}) const { detail::store_lanes(p, detail::narrow_to_bf16(v)); }
  /// The first n lanes from memory, `fill` in the rest; touches no byte past them. 0 <= n <= 16.
  static CAPSTAN_INLINE Vec load_partial(const float* p, int n, float fill = 0) {
#if defined(CAPSTAN_AVX512)
    return Vec(reinterpret_cast<detail::F32x16>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), detail::first16(n), p)));
#elif defined(__AVX2__)
    const __m256i a = detail::first_of_8(n), b = detail::first_of_8(n - 8);
    const __m256 f = _mm256_set1_ps(fill);
    return Vec(detail::F32x16{_mm256_blendv_ps(f, _mm256_maskload_ps(p, a), _mm256_castsi256_ps(a)),
                              _mm256_blendv_ps(f, _mm256_maskload_ps(p + 8, b), _mm256_castsi256_ps(b))});
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
    float wide[lanes];
    Vec(detail::widen_bf16(h)).store(wide);
    for (int i = n; i < lanes; ++i) wide[i] = fill;
    return load(wide);
#endif
  }
  CAPSTAN_INLINE void store_partial(float* p, int n) const {
#if defined(CAPSTAN_AVX512)
    _mm512_mask_storeu_ps(p, detail::first16(n), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, detail::first_of_8(n), v.lo);
    _mm256_maskstore_ps(p + 8, detail::first_of_8(n - 8), v.hi);
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
  CAPSTAN_INLINE Vec(double x) : v(detail::splat<detail::F64x8>(x)) {}
  static CAPSTAN_INLINE Vec broadcast(double x) { return Vec(x); }

  static CAPSTAN_INLINE Vec load(const double* p, Full = {}) { return Vec(detail::load_lanes<detail::F64x8>(p)); }
  CAPSTAN_INLINE void store(double* p, Full = {}) const { detail::store_lanes(p, v); }
  static CAPSTAN_INLINE Vec load_partial(const double* p, int n, double fill = 0) {
#if defined(CAPSTAN_AVX512)
    return Vec(reinterpret_cast<detail::F64x8>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), detail::first8(n), p)));
#elif defined(__AVX2__)
    const __m256i a = detail::first_of_4(n), b = detail::first_of_4(n - 4);
    const __m256d f = _mm256_set1_pd(fill);
    return Vec(detail::F64x8{_mm256_blendv_pd(f, _mm256_maskload_pd(p, a), _mm256_castsi256_pd(a)),
                             _mm256_blendv_pd(f, _mm256_maskload_pd(p + 4, b), _mm256_castsi256_pd(b))});
#else
    Vec r(fill);
    std::memcpy(&r.v, p, static_cast<std::size_t>(n) * sizeof(double));
    return r;
#endif
  }
  CAPSTAN_INLINE void store_partial(double* p, int n) const {
#if defined(CAPSTAN_AVX512)
    _mm512_mask_storeu_pd(p, detail::first8(n), reinterpret_cast<__m512d>(v));
#elif defined(__AVX2__)
    _mm256_maskstore_pd(p, detail::first_of_4(n), v.lo);
    _mm256_maskstore_pd(p + 4, detail::first_of_4(n - 4), v.hi);
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
CAPSTAN_INLINE Vec<float> select(Mask<float> m, Vec<float> yes, Vec<float> no) { return Vec<float>(detail::choose(m.v, yes.v, no.v)); }
CAPSTAN_INLINE Vec<double> select(Mask<double> m, Vec<double> yes, Vec<double> no) { return Vec<double>(detail::choose(m.v, yes.v, no.v)); }

/// The second operand where either is NaN.
template <class T> CAPSTAN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) { return select(a > b, a, b); }
template <class T> CAPSTAN_INLINE Vec<T> min(Vec<T> a, Vec<T> b) { return select(a < b, a, b); }

/// a * b + c, rounded once.
CAPSTAN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<detail::F32x16>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a.v), reinterpret_cast<__m512>(b.v), reinterpret_cast<__m512>(c.v))));
#elif defined(__AVX2__) && defined(__FMA__)
  return Vec<float>(detail::F32x16{_mm256_fmadd_ps(a.v.lo, b.v.lo, c.v.lo), _mm256_fmadd_ps(a.v.hi, b.v.hi, c.v.hi)});
#else
  float r[16];
  for (int i = 0; i < 16; ++i) r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return Vec<float>::load(r);
#endif
}
CAPSTAN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(CAPSTAN_AVX512)
  return Vec<double>(reinterpret_cast<detail::F64x8>(_mm512_fmadd_pd(
      reinterpret_cast<__m512d>(a.v), reinterpret_cast<__m512d>(b.v), reinterpret_cast<__m512d>(c.v))));
#elif defined(__AVX2__) && defined(__FMA__)
  return Vec<double>(detail::F64x8{_mm256_fmadd_pd(a.v.lo, b.v.lo, c.v.lo), _mm256_fmadd_pd(a.v.hi, b.v.hi, c.v.hi)});
#else
  double r[8];
  for (int i = 0; i < 8; ++i) r[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
  return Vec<double>::load(r);
#endif
}

CAPSTAN_INLINE Vec<float> sqrt(Vec<float> a) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<detail::F32x16>(_mm512_maskz_sqrt_ps(detail::all16, reinterpret_cast<__m512>(a.v))));
#elif defined(__AVX2__)
  return Vec<float>(detail::F32x16{_mm256_sqrt_ps(a.v.lo), _mm256_sqrt_ps(a.v.hi)});
#else
  float r[16];
  for (int i = 0; i < 16; ++i) r[i] = __builtin_sqrtf(a.v[i]);
  return Vec<float>::load(r);
#endif
}
CAPSTAN_INLINE Vec<double> sqrt(Vec<double> a) {
#if defined(CAPSTAN_AVX512)
  return Vec<double>(reinterpret_cast<detail::F64x8>(_mm512_maskz_sqrt_pd(detail::all8, reinterpret_cast<__m512d>(a.v))));
#elif defined(__AVX2__)
  return Vec<double>(detail::F64x8{_mm256_sqrt_pd(a.v.lo), _mm256_sqrt_pd(a.v.hi)});
#else
  double r[8];
  for (int i = 0; i < 8; ++i) r[i] = __builtin_sqrt(a.v[i]);
  return Vec<double>::load(r);
#endif
}
CAPSTAN_INLINE Vec<float> abs(Vec<float> a) {
  return Vec<float>(detail::bits<detail::F32x16>(detail::bits<detail::I32x16>(a.v) & 0x7fffffff));
}
CAPSTAN_INLINE Vec<double> abs(Vec<double> a) {
  return Vec<double>(detail::bits<detail::F64x8>(detail::bits<detail::I64x8>(a.v) & 0x7fffffffffffffffll));
}

namespace detail {
// The upper half of the lanes meets the lower half until one is left: lane i with i + 8, then 4, 2, 1.
template <class F> CAPSTAN_INLINE float fold(Vec<float> a, F f) {
  const F32x8 e = f(lower(a.v), upper(a.v));
  const F32x4 q = f(__builtin_shufflevector(e, e, 0, 1, 2, 3), __builtin_shufflevector(e, e, 4, 5, 6, 7));
  const F32x4 d = f(q, __builtin_shufflevector(q, q, 2, 3, 2, 3));
  return f(d, __builtin_shufflevector(d, d, 1, 1, 1, 1))[0];
}
template <class F> CAPSTAN_INLINE double fold(Vec<double> a, F f) {
  const F64x4 q = f(lower(a.v), upper(a.v));
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
  return convert<I32x16>(a.v);
}
CAPSTAN_INLINE Vec<float> to_float(I32x16 a) {
  return Vec<float>(convert<F32x16>(a));
}
// a * 2^n, rounded once. n in [-160, 130].
CAPSTAN_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n) {
#if defined(CAPSTAN_AVX512)
  return Vec<float>(reinterpret_cast<F32x16>(_mm512_maskz_scalef_ps(all16, reinterpret_cast<__m512>(a.v),
                                                                     reinterpret_cast<__m512>(n.v))));
#else
  const I32x16 k = to_int(n), first = k >> 1, second = k - first;
  const Vec<float> f(bits<F32x16>((first + 127) << 23)), s(bits<F32x16>((second + 127) << 23));
  return (a * f) * s;
#endif
}
/// e^r = 1 + r + r^2 P(r) on |r| <= ln(2)/2: minimax in relative error, 3.3e-9.
CAPSTAN_INLINE Vec<float> exp_reduced(Vec<float> r) {
  using V = Vec<float>;
  V p = fma(V(0.00138131422661f), r, V(0.00836941880229f));
  p = fma(p, r, V(0.0416684568194f));
  p = fma(p, r, V(0.166665147919f));
  p = fma(p, r, V(0.499999930507f));
  return fma(p, r * r, r) + V(1.f);
}
template <class F> CAPSTAN_INLINE Vec<double> each_lane(Vec<double> a, F f) {
  double x[8];
  a.store(x);
  for (double& e : x) e = f(e);
  return Vec<double>::load(x);
}
}  // namespace detail

/// e^a, within 1 ulp; gradual below 2^-126; 0 at -inf, inf at +inf, NaN at NaN.
CAPSTAN_INLINE Vec<float> exp(Vec<float> a) {
  using V = Vec<float>;
  const V x = min(V(90.f), max(V(-105.f), a));  // the order keeps a NaN
  const V n = detail::round_to_int(x * V(1.44269504088896341f));
  const V r = fma(n, V(-0.693359375f), x);  // ln 2 in two parts; the first has 9 bits, so n times it is exact
  return detail::scale2(detail::exp_reduced(fma(n, V(2.12194440054690583e-4f), r)), n);
}
CAPSTAN_INLINE Vec<double> exp(Vec<double> a) { return detail::each_lane(a, [](double x) { return std::exp(x); }); }

/// e^a within 1 ulp with results below e^-87 made 0 and e^88.5 above that; NaN at NaN. For softmax, where tiny terms vanish
/// beside 1, denormal lanes would cost a hundred times the others, and the exponent can be added to in place.
CAPSTAN_INLINE Vec<float> exp_flushed(Vec<float> a) {
  using V = Vec<float>;
  const V lowest(-87.f), magic(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to its last bit, an integer
  const V x = min(V(88.5f), max(lowest, a));
  const V shifted = fma(x, V(1.44269504088896341f), magic), n = shifted - magic;
  const V p = detail::exp_reduced(fma(n, V(2.12194440054690583e-4f), fma(n, V(-0.693359375f), x)));
  const V scaled(detail::bits<detail::F32x16>(detail::bits<detail::I32x16>(p.v) + (detail::bits<detail::I32x16>(shifted.v) << 23)));
  return select(a < lowest, V(0.f), scaled);
}
CAPSTAN_INLINE Vec<double> exp_flushed(Vec<double> a) { return exp(a); }

/// Natural logarithm, within 2 ulp; -inf at 0, inf at inf, NaN below 0 and at NaN.
CAPSTAN_INLINE Vec<float> log(Vec<float> a) {
  using V = Vec<float>;
  const Mask<float> tiny = a < V(std::numeric_limits<float>::min());
  const V x = select(tiny, a * V(8388608.f), a);  // denormals times 2^23
    // Splits x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const detail::I32x16 shifted = detail::bits<detail::I32x16>(x.v) - 0x3f3504f3;
  const detail::I32x16 e_bits = shifted >> 23;
  const V e = detail::to_float(e_bits) + select(tiny, V(-23.f), V(0.f));
  const V m(detail::bits<detail::F32x16>((shifted & 0x007fffff) + 0x3f3504f3));
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

/// 1 / (1 + e^-a), within 2 ulp on both sides: no cancellation for large negative a; 0 below -87.
template <class T> CAPSTAN_INLINE Vec<T> sigmoid(Vec<T> a) {
  const Vec<T> one(T(1)), z = exp_flushed(-abs(a));
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
  const detail::I32x16 sign = detail::bits<detail::I32x16>(a.v) & static_cast<std::int32_t>(0x80000000u);
  return V(detail::bits<detail::F32x16>(detail::bits<detail::I32x16>(r.v) | sign));
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
