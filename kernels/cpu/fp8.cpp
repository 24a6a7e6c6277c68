// fp8 on the CPU: quantizers by tiles of 32 x 32, products of dequantized values. A scale is a power of two, so a
// dequantized number is exact, and scaling before the sum is scaling after it.
#include <kernels/cpu/fp8.h>
#include <kernels/cpu/gemm.h>
#include <kernels/shared/fp8.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace capstan::kernels::cpu {

namespace {

constexpr std::int64_t tile = fp8_block;

template <class T>
std::uint32_t largest_magnitude(Context& ctx, const Quantize& q) {
  const T* x = static_cast<const T*>(q.x);
  std::uint32_t most = 0;
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) reduction(max : most) if (q.rows * q.cols > 16384)
  for (std::int64_t r = 0; r < q.rows; ++r)
    for (std::int64_t c = 0; c < q.cols; ++c)
      most = std::max(most, bits_of(static_cast<float>(x[r * q.stride + c])) & 0x7fffffffu);
  return most;
}

/// Rows [r0, r0 + 32) of x and of what they become.
template <class T, class F>
void quantize_rows(const Quantize& q, std::int64_t r0, std::uint32_t whole) {
  const T* x = static_cast<const T*>(q.x);
  const std::int64_t padded = fp8_padded(q.scaling, q.rows), rows = std::min(tile, q.rows - r0),
                     room = std::min(tile, padded - r0);
  const bool blocks = q.scaling == Scaling::block;
  float v[tile][tile];
  std::uint32_t amax[tile];
  for (std::int64_t c0 = 0; c0 < q.cols; c0 += tile) {
    const std::int64_t cols = std::min(tile, q.cols - c0);
    for (std::int64_t r = 0; r < tile; ++r)
      for (std::int64_t c = 0; c < tile; ++c)
        v[r][c] = r < rows && c < cols ? static_cast<float>(x[(r0 + r) * q.stride + c0 + c]) : 0.0f;
    if (q.data != nullptr) {
      for (std::int64_t r = 0; r < rows; ++r) {
        std::uint32_t code = whole;
        if (blocks) {
          std::uint32_t most = 0;
          for (std::int64_t c = 0; c < tile; ++c) most = std::max(most, bits_of(v[r][c]) & 0x7fffffffu);
          code = scale_code<F>(most);
          static_cast<std::uint8_t*>(q.scale)[block_scale_at(r0 + r, c0 / tile, q.cols / tile)] =
              static_cast<std::uint8_t>(code);
        }
        const float inverse = e8m0_inverse(code);
        std::uint8_t* to = static_cast<std::uint8_t*>(q.data) + (r0 + r) * q.cols + c0;
        for (std::int64_t c = 0; c < cols; ++c) to[c] = to_fp8<F>(v[r][c] * inverse);
      }
    }
    if (q.turned == nullptr) continue;
    std::fill_n(amax, tile, 0u);
    if (blocks)
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < tile; ++c) amax[c] = std::max(amax[c], bits_of(v[r][c]) & 0x7fffffffu);
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::uint32_t code = blocks ? scale_code<F>(amax[c]) : whole;
      if (blocks)
        static_cast<std::uint8_t*>(q.turned_scale)[block_scale_at(c0 + c, r0 / tile, padded / tile)] =
            static_cast<std::uint8_t>(code);
      const float inverse = e8m0_inverse(code);
      std::uint8_t* to = static_cast<std::uint8_t*>(q.turned) + (c0 + c) * padded + r0;
      for (std::int64_t r = 0; r < room; ++r) to[r] = to_fp8<F>(v[r][c] * inverse);
    }
  }
}

template <class T, class F>
void quantize_as(Context& ctx, const Quantize& q) {
  std::uint32_t whole = 127;
  if (q.scaling == Scaling::tensor) {
    const std::uint32_t most = largest_magnitude<T>(ctx, q);
    whole = scale_code<F>(most);
    const float scale[2] = {e8m0_value(whole), float_of(most)};
    std::memcpy(q.scale, scale, sizeof scale);
  } else {
    if (q.data != nullptr) std::memset(q.scale, 0, static_cast<std::size_t>(scale_bytes(q.scaling, q.rows, q.cols)));
    if (q.turned != nullptr)
      std::memset(q.turned_scale, 0,
                  static_cast<std::size_t>(scale_bytes(q.scaling, q.cols, fp8_padded(q.scaling, q.rows))));
  }
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (q.rows * q.cols > 16384)
  for (std::int64_t r0 = 0; r0 < q.rows; r0 += tile) quantize_rows<T, F>(q, r0, whole);
}

template <class F>
void dequantize_as(Context& ctx, Scaling scaling, const void* data, const void* scale, std::int64_t rows, std::int64_t k,
                   float* to) {
  float values[256];
  for (int i = 0; i < 256; ++i) values[i] = from_fp8<F>(static_cast<std::uint8_t>(i));
  float whole = 1;
  if (scaling == Scaling::tensor) std::memcpy(&whole, scale, sizeof whole);
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (rows * k > 16384)
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto* from = static_cast<const std::uint8_t*>(data) + r * k;
    for (std::int64_t c0 = 0; c0 < k; c0 += fp8_block) {
      const float s =
          scaling == Scaling::tensor
              ? whole
              : e8m0_value(static_cast<const std::uint8_t*>(scale)[block_scale_at(r, c0 / fp8_block, k / fp8_block)]);
      const std::int64_t end = std::min(k, c0 + fp8_block);
      for (std::int64_t c = c0; c < end; ++c) to[r * k + c] = values[from[c]] * s;
    }
  }
}

void dequantize(Context& ctx, Num num, Scaling scaling, const void* data, const void* scale, std::int64_t rows,
                std::int64_t k, float* to) {
  if (num == Num::f8e4m3)
    dequantize_as<E4M3>(ctx, scaling, data, scale, rows, k, to);
  else if (num == Num::f8e5m2)
    dequantize_as<E5M2>(ctx, scaling, data, scale, rows, k, to);
  else
    throw std::invalid_argument("[gemm_fp8] operands: expected e4m3 or e5m2, got element type number " +
                                std::to_string(static_cast<int>(num)));
}

template <class C>
void store(Context& ctx, const GemmFp8& g, const float* product, C* c, const C* bias, const C* residual) {
#pragma omp parallel for num_threads(ctx.threads()) schedule(static) if (g.m * g.n > 16384)
  for (std::int64_t r = 0; r < g.m; ++r)
    for (std::int64_t j = 0; j < g.n; ++j) {
      float v = product[r * g.n + j];
      if (bias != nullptr) v += static_cast<float>(bias[j]);
      if (residual != nullptr)
        v += static_cast<float>(residual[r * g.ldc + j]);
      else if (g.accumulate)
        v += static_cast<float>(c[r * g.ldc + j]);
      c[r * g.ldc + j] = C(v);
    }
}

}  // namespace

void quantize(Context& ctx, const Quantize& q) {
  const auto as = [&]<class F>() {
    if (q.from == Num::f32)
      quantize_as<float, F>(ctx, q);
    else if (q.from == Num::bf16)
      quantize_as<bf16, F>(ctx, q);
    else
      throw std::invalid_argument("[quantize] from: expected f32 or bf16, got element type number " +
                                  std::to_string(static_cast<int>(q.from)));
  };
  if (q.to == Num::f8e4m3)
    as.template operator()<E4M3>();
  else if (q.to == Num::f8e5m2)
    as.template operator()<E5M2>();
  else
    throw std::invalid_argument("[quantize] to: expected e4m3 or e5m2, got element type number " +
                                std::to_string(static_cast<int>(q.to)));
}

void gemm_fp8(Context& ctx, const GemmFp8& g, const void* a, const void* b, void* c, const void* bias,
              const void* residual) {
  if (g.m == 0 || g.n == 0) return;
  const auto floats = [](std::int64_t n) { return std::unique_ptr<float[]>(new float[static_cast<std::size_t>(n)]); };
  const auto wide_a = floats(g.m * g.k), wide_b = floats(g.n * g.k);
  dequantize(ctx, g.a, g.scaling, a, g.a_scale, g.m, g.k, wide_a.get());
  dequantize(ctx, g.b, g.scaling, b, g.b_scale, g.n, g.k, wide_b.get());
  Gemm product;
  product.trans_b = product.invariant = true;
  product.m = g.m, product.n = product.ldc = g.n, product.k = product.lda = product.ldb = g.k;
  const bool plain = g.c == Num::f32 && g.ldc == g.n && bias == nullptr && residual == nullptr && !g.accumulate;
  if (plain) return gemm(ctx, product, wide_a.get(), wide_b.get(), c);
  const auto sums = floats(g.m * g.n);
  gemm(ctx, product, wide_a.get(), wide_b.get(), sums.get());
  if (g.c == Num::f32)
    store(ctx, g, sums.get(), static_cast<float*>(c), static_cast<const float*>(bias), static_cast<const float*>(residual));
  else if (g.c == Num::bf16)
    store(ctx, g, sums.get(), static_cast<bf16*>(c), static_cast<const bf16*>(bias), static_cast<const bf16*>(residual));
  else
    throw std::invalid_argument("[gemm_fp8] result: expected f32 or bf16, got element type number " +
                                std::to_string(static_cast<int>(g.c)));
}

}  // namespace capstan::kernels::cpu
