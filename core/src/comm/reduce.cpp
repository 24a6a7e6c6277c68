// Sums in rank order, in blocks that stay in the first cache.
#include "comm/reduce.h"

#include <capstan/error.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

namespace capstan::comm {
namespace {

constexpr std::int64_t kBlock = 1024;

template <Reduction op, class T>
inline T combine(T a, T b) {
  if constexpr (op == Reduction::sum) {
    if constexpr (std::is_integral_v<T>) {
      using U = std::make_unsigned_t<T>;
      return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    } else {
      return a + b;
    }
  } else if constexpr (op == Reduction::max) {
    return (b > a || b != b) ? b : a;
  } else {
    return (b < a || b != b) ? b : a;
  }
}

// In is what the ranks hold, Sum what is added in, Out what comes out.
template <Reduction op, class In, class Sum, class Out>
void reduce(std::span<const void* const> in, void* out_, std::int64_t count) {
  Out* out = static_cast<Out*>(out_);
  const std::size_t n = in.size();
  alignas(64) Sum acc[kBlock];
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t m = std::min(kBlock, count - begin);
    const In* a = static_cast<const In*>(in[0]) + begin;
    if (n == 1) {
      for (std::int64_t i = 0; i < m; ++i) acc[i] = static_cast<Sum>(a[i]);
    } else {
      const In* b = static_cast<const In*>(in[1]) + begin;
      for (std::int64_t i = 0; i < m; ++i) acc[i] = combine<op>(static_cast<Sum>(a[i]), static_cast<Sum>(b[i]));
      for (std::size_t r = 2; r < n; ++r) {
        const In* c = static_cast<const In*>(in[r]) + begin;
        for (std::int64_t i = 0; i < m; ++i) acc[i] = combine<op>(acc[i], static_cast<Sum>(c[i]));
      }
    }
    // Sources are read before `out` is written: it may be one of them.
    for (std::int64_t i = 0; i < m; ++i) out[begin + i] = static_cast<Out>(acc[i]);
  }
}

template <class In, class Sum, class Out>
void reduce(std::span<const void* const> in, void* out, std::int64_t count, Reduction op) {
  switch (op) {
    case Reduction::sum: return reduce<Reduction::sum, In, Sum, Out>(in, out, count);
    case Reduction::max: return reduce<Reduction::max, In, Sum, Out>(in, out, count);
    case Reduction::min: return reduce<Reduction::min, In, Sum, Out>(in, out, count);
  }
}

template <class T>
void reduce_plain(std::span<const void* const> in, void* out, std::int64_t count, Reduction op) {
  if (in.size() == 1) {
    if (in[0] != out) std::memcpy(out, in[0], static_cast<std::size_t>(count) * sizeof(T));
    return;
  }
  reduce<T, T, T>(in, out, count, op);
}

void reduce_any(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op) {
  switch (dtype) {
    case DType::f32: return reduce_plain<float>(in, out, count, op);
    case DType::f64: return reduce_plain<double>(in, out, count, op);
    case DType::i32: return reduce_plain<std::int32_t>(in, out, count, op);
    case DType::i64: return reduce_plain<std::int64_t>(in, out, count, op);
    case DType::u8: return reduce_plain<std::uint8_t>(in, out, count, op);
    default: fail(Fault::programming, "communicator", "cannot reduce " + std::string(name_of(dtype)) +
                                                          ": expected f32, f64, bf16, i32, i64 or u8");
  }
}

}  // namespace

bool reducible(DType d) {
  return d == DType::f32 || d == DType::f64 || d == DType::bf16 || d == DType::i32 || d == DType::i64 || d == DType::u8;
}
DType partial_of(DType dtype) { return dtype == DType::bf16 ? DType::f32 : dtype; }

void reduce_ranks(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op) {
  if (count == 0) return;
  if (dtype == DType::bf16) return reduce<bf16, float, bf16>(in, out, count, op);
  reduce_any(in, out, count, dtype, op);
}

void reduce_partial(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op) {
  if (count == 0) return;
  if (dtype == DType::bf16) return reduce<bf16, float, float>(in, out, count, op);
  reduce_any(in, out, count, dtype, op);
}

void reduce_finish(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op) {
  if (count == 0) return;
  if (dtype == DType::bf16) return reduce<float, float, bf16>(in, out, count, op);
  reduce_any(in, out, count, dtype, op);
}

}  // namespace capstan::comm
