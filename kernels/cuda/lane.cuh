// defines: Lane<T>, one number with the names that kernels/shared/elements.h uses; Pack<T, N>, what one thread loads at
// once; at(), an element's place in a strided walk.
#pragma once
#include <capstan/kernels/bf16.h>
#include <kernels/cuda/context.h>
#include <kernels/shared/elements.h>

namespace capstan::kernels::cuda {

template <class T>
struct Lane {
  using Scalar = T;
  T v;
  __device__ __forceinline__ Lane(T x) : v(x) {}
  __device__ __forceinline__ Lane operator-() const { return -v; }
  friend __device__ __forceinline__ Lane operator+(Lane a, Lane b) { return a.v + b.v; }
  friend __device__ __forceinline__ Lane operator-(Lane a, Lane b) { return a.v - b.v; }
  friend __device__ __forceinline__ Lane operator*(Lane a, Lane b) { return a.v * b.v; }
  friend __device__ __forceinline__ Lane operator/(Lane a, Lane b) { return a.v / b.v; }
};
template <class T> __device__ __forceinline__ Lane<T> fma(Lane<T> a, Lane<T> b, Lane<T> c) { return ::fma(a.v, b.v, c.v); }
template <class T> __device__ __forceinline__ Lane<T> min(Lane<T> a, Lane<T> b) { return a.v < b.v ? a.v : b.v; }
template <class T> __device__ __forceinline__ Lane<T> exp(Lane<T> a) { return ::exp(a.v); }
template <class T> __device__ __forceinline__ Lane<T> log(Lane<T> a) { return ::log(a.v); }
template <class T> __device__ __forceinline__ Lane<T> sqrt(Lane<T> a) { return ::sqrt(a.v); }
template <class T> __device__ __forceinline__ Lane<T> tanh(Lane<T> a) { return ::tanh(a.v); }
/// 1 / (1 + e^-a): no cancellation on either side.
template <class T>
__device__ __forceinline__ Lane<T> sigmoid(Lane<T> a) {
  const T z = ::exp(-::fabs(a.v));
  return (a.v >= T(0) ? T(1) : z) / (T(1) + z);
}

/// N elements of T, loaded and stored as one when N * sizeof(T) is 4, 8 or 16.
template <class T, int N>
struct alignas(N * sizeof(T) > 16 ? 16 : N * sizeof(T)) Pack { T v[N]; };

/// Places of element i (in row-major order of `shape`) on the two sides.
struct Places { std::int64_t a, b; };
template <class Index>
__device__ __forceinline__ Places places(const std::int64_t* shape, const std::int64_t* sa, const std::int64_t* sb, int rank, Index i) {
  Places p{0, 0};
  for (int d = rank - 1; d > 0; --d) {
    const Index extent = static_cast<Index>(shape[d]), quotient = i / extent, rest = i - quotient * extent;
    p.a += static_cast<std::int64_t>(rest) * sa[d], p.b += static_cast<std::int64_t>(rest) * sb[d];
    i = quotient;
  }
  p.a += static_cast<std::int64_t>(i) * sa[0], p.b += static_cast<std::int64_t>(i) * sb[0];
  return p;
}

template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, From>) return x;
  else if constexpr (std::is_same_v<To, bf16>) return bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<From, bf16>) return static_cast<To>(static_cast<float>(x));
  else return static_cast<To>(x);
}

}  // namespace capstan::kernels::cuda
