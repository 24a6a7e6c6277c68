// Strided copies and casts.
#include <kernels/cpu/copy.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace capstan::kernels::cpu {

namespace {

/// Calls f with a null T* of the element's C++ type.
template <class F>
void visit_all(Num num, F&& f) {
  switch (num) {
    case Num::f64: return f(static_cast<double*>(nullptr));
    case Num::f32: return f(static_cast<float*>(nullptr));
    case Num::bf16: return f(static_cast<bf16*>(nullptr));
    case Num::i32: return f(static_cast<std::int32_t*>(nullptr));
    case Num::i64: return f(static_cast<std::int64_t*>(nullptr));
    case Num::u8:
    case Num::boolean: return f(static_cast<std::uint8_t*>(nullptr));
    default: throw std::invalid_argument("[copy] element type number " + std::to_string(static_cast<int>(num)) + " has no CPU arithmetic");
  }
}

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<To, bf16>) return bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<From, bf16>) return static_cast<To>(static_cast<float>(x));
  else return static_cast<To>(x);
}

std::int64_t product(const Strided& s) {
  std::int64_t n = 1;
  for (int d = 0; d < s.rank; ++d) n *= s.shape[d];
  return n;
}

bool contiguous(const Strided& s, const std::int64_t* strides) {
  std::int64_t step = 1;
  for (int d = s.rank - 1; d >= 0; --d) {
    if (s.shape[d] != 1 && strides[d] != step) return false;
    step *= s.shape[d];
  }
  return true;
}

/// Walks both sides row by row (the last dimension is the inner loop), on the context's threads.
template <class To, class From>
void walk(Context& ctx, const Strided& s, To* to, const From* from) {
  if (product(s) == 0) return;
  const int r = s.rank;
  const std::int64_t n = r == 0 ? 1 : s.shape[r - 1], ts = r == 0 ? 1 : s.to[r - 1], fs = r == 0 ? 1 : s.from[r - 1];
  const std::int64_t rows = product(s) / n;
#pragma omp parallel for num_threads(ctx.threads()) if (rows * n > 65536)
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t left = row;
    To* t = to;
    const From* f = from;
    for (int d = r - 2; d >= 0; --d) {
      const std::int64_t i = left % s.shape[d];
      left /= s.shape[d];
      t += i * s.to[d], f += i * s.from[d];
    }
    if (ts == 1 && fs == 1) {
      if constexpr (std::is_same_v<To, From>) std::memcpy(t, f, static_cast<std::size_t>(n) * sizeof(To));
      else for (std::int64_t i = 0; i < n; ++i) t[i] = convert<To>(f[i]);
    } else {
      for (std::int64_t i = 0; i < n; ++i) t[i * ts] = convert<To>(f[i * fs]);
    }
  }
}

}  // namespace

void copy(Context& ctx, const Strided& shape, Num to_num, void* to, Num from_num, const void* from) {
  const std::int64_t n = product(shape);
  if (n == 0) return;
  Strided s = shape;
  if (contiguous(s, s.to) && contiguous(s, s.from)) {
    if (to_num == from_num && n * bytes_of(to_num) < (1 << 20)) {
      std::memcpy(to, from, static_cast<std::size_t>(n * bytes_of(to_num)));
      return;
    }
    const std::int64_t row = n % 4096 == 0 ? 4096 : n % 64 == 0 ? 64 : n;  // rows of a fixed length, so that threads share the work
    s.rank = 2;
    s.shape[0] = n / row, s.shape[1] = row;
    s.to[0] = s.from[0] = row, s.to[1] = s.from[1] = 1;
  }
  visit_all(to_num, [&]<class To>(To*) {
    visit_all(from_num, [&]<class From>(From*) { walk(ctx, s, static_cast<To*>(to), static_cast<const From*>(from)); });
  });
}

void fill(Context& ctx, const Strided& shape, Num num, void* to, double value) {
  Strided s = shape;
  for (int d = 0; d < s.rank; ++d) s.from[d] = 0;
  visit_all(num, [&]<class T>(T*) {
    const T v = convert<T>(value);
    walk(ctx, s, static_cast<T*>(to), &v);
  });
}

}  // namespace capstan::kernels::cpu
