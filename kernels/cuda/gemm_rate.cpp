// The rate of large products: what a step's speed is held against.
#include <kernels/cuda/elementwise.h>
#include <kernels/cuda/fp8.h>
#include <kernels/cuda/gemm.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace capstan::kernels::cuda {

namespace {

/// Device memory for a measurement.
class Room {
 public:
  Room(Context& ctx, std::int64_t bytes) : ctx_(ctx), data_(ctx.allocate(bytes)) {
    if (data_ == nullptr) throw std::runtime_error("[cuda memory] no room for " + std::to_string(bytes) + " bytes to measure products with");
  }
  ~Room() { ctx_.release(data_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  void* get() const { return data_; }

 private:
  Context& ctx_;
  void* data_;
};

/// n x n random values: zeros would run faster than real ones.
void fill(Context& ctx, Num num, std::int64_t n, std::uint64_t key, void* to) {
  RandomFill values;
  values.key = key, values.normal = false, values.scale = 1;
  random(ctx, num, values, n * n, to);
}

/// A product that takes this long is large enough, and repeating it for that long is enough of it.
constexpr double large = 1e-3, enough = 0.1;

template <class Run>
double best_rate(Context& ctx, std::int64_t n, const Run& run, double* shortest) {
  Events events;
  const auto side = static_cast<double>(n);
  for (int i = 0; i < 3; ++i) run();
  double spent = 0;
  for (int i = 0; i < 10 && (i == 0 || spent < enough); ++i) {
    const double seconds = events.seconds(ctx, run);
    *shortest = i == 0 ? seconds : std::min(*shortest, seconds);
    spent += seconds;
  }
  return 2 * side * side * side / *shortest;
}

/// Sides from 512 to `most`, until a product is large enough.
template <class RateOf>
double rate_of_large(std::int64_t most, const RateOf& rate_of) {
  for (std::int64_t n = 512;; n = std::min(most, 2 * n)) {
    double shortest = 0;
    const double rate = rate_of(n, &shortest);
    if (n == most || shortest >= large) return rate;
  }
}

}  // namespace

double gemm_rate(Context& ctx, Num num) {
  return rate_of_large(num == Num::bf16 ? 8192 : 4096, [&](std::int64_t n, double* shortest) {
    const Room a(ctx, n * n * bytes_of(num)), b(ctx, n * n * bytes_of(num)), c(ctx, n * n * bytes_of(num));
    fill(ctx, num, n, 1, a.get()), fill(ctx, num, n, 2, b.get());
    Gemm g;
    g.a = g.b = g.c = num, g.trans_b = true;
    g.m = g.n = g.k = g.lda = g.ldb = g.ldc = n;
    return best_rate(ctx, n, [&] { gemm(ctx, g, a.get(), b.get(), c.get(), nullptr, nullptr); }, shortest);
  });
}

double gemm_rate_fp8(Context& ctx) {
  return rate_of_large(8192, [&](std::int64_t n, double* shortest) {
    const Room a(ctx, n * n), b(ctx, n * n), a_scale(ctx, 256), b_scale(ctx, 256), c(ctx, 2 * n * n);
    const auto quantized = [&](std::uint64_t key, const Room& to, const Room& scale) {
      fill(ctx, Num::bf16, n, key, c.get());
      Quantize q;
      q.rows = q.cols = q.stride = n, q.x = c.get(), q.data = to.get(), q.scale = scale.get();
      quantize(ctx, q);
    };
    quantized(1, a, a_scale), quantized(2, b, b_scale);
    GemmFp8 g;
    g.m = g.n = g.k = g.ldc = n, g.a_scale = a_scale.get(), g.b_scale = b_scale.get();
    return best_rate(ctx, n, [&] { gemm_fp8(ctx, g, a.get(), b.get(), c.get(), nullptr, nullptr); }, shortest);
  });
}

}  // namespace capstan::kernels::cuda
