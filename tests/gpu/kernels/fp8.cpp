// Quantizers to fp8: the GPU's bytes and scales against those of a plain loop over the functions that both share, over odd
// shapes, types, misaligned rows, infinities and NaNs.
#include "harness.h"

#include <kernels/cuda/fp8.h>
#include <kernels/shared/fp8.h>

#include <limits>

namespace gpu_test {

namespace cuda = capstan::kernels::cuda;
namespace k = capstan::kernels;

namespace {

struct Want {
  std::vector<std::uint8_t> data, scale, turned, turned_scale;
};

template <class F>
Want expected(const std::vector<float>& x, std::int64_t rows, std::int64_t cols, k::Scaling scaling) {
  const std::int64_t length = k::fp8_padded(scaling, rows);
  Want w;
  const bool blocks = scaling == k::Scaling::block;
  w.data.resize(static_cast<std::size_t>(rows * cols)), w.turned.resize(static_cast<std::size_t>(cols * length));
  w.scale.resize(static_cast<std::size_t>(k::scale_bytes(scaling, rows, cols))),
      w.turned_scale.resize(static_cast<std::size_t>(k::scale_bytes(scaling, cols, length)));
  const auto at = [&](std::int64_t r, std::int64_t c) {
    return r < rows ? x[static_cast<std::size_t>(r * cols + c)] : 0.0f;
  };
  const auto largest = [&](std::int64_t r0, std::int64_t r1, std::int64_t c0, std::int64_t c1) {
    std::uint32_t most = 0;
    for (std::int64_t r = r0; r < r1; ++r)
      for (std::int64_t c = c0; c < c1; ++c) most = std::max(most, k::bits_of(at(r, c)) & 0x7fffffffu);
    return most;
  };
  const std::uint32_t amax = largest(0, rows, 0, cols), whole = k::scale_code<F>(amax);
  if (!blocks) {
    const float scale[2] = {k::e8m0_value(whole), k::float_of(amax)};
    std::memcpy(w.scale.data(), scale, 8), std::memcpy(w.turned_scale.data(), scale, 8);
  }
  for (std::int64_t r = 0; r < length; ++r)
    for (std::int64_t c = 0; c < cols; ++c) {
      std::uint32_t code = whole, turned = whole;
      if (blocks) {
        const std::int64_t r0 = r / 32 * 32, c0 = c / 32 * 32;
        code = k::scale_code<F>(largest(r, r + 1, c0, c0 + 32)), turned = k::scale_code<F>(largest(r0, r0 + 32, c, c + 1));
        if (r < rows)
          w.scale[static_cast<std::size_t>(k::block_scale_at(r, c / 32, cols / 32))] = static_cast<std::uint8_t>(code);
        w.turned_scale[static_cast<std::size_t>(k::block_scale_at(c, r / 32, length / 32))] =
            static_cast<std::uint8_t>(turned);
      }
      if (r < rows) w.data[static_cast<std::size_t>(r * cols + c)] = k::to_fp8<F>(at(r, c) * k::e8m0_inverse(code));
      w.turned[static_cast<std::size_t>(c * length + r)] = k::to_fp8<F>(at(r, c) * k::e8m0_inverse(turned));
    }
  return w;
}

template <class T, class F>
void matrix(Context& ctx, std::int64_t rows, std::int64_t cols, std::int64_t more, std::int64_t shift, k::Scaling scaling,
            float special, bool parts_alone = true) {
  const std::int64_t stride = cols + more, length = k::fp8_padded(scaling, rows);
  auto x = random_values<T>(rows * stride, static_cast<std::uint64_t>(rows + 7 * cols));
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = T(static_cast<float>(x[i]) * std::ldexp(1.0f, static_cast<int>(i / 29 % 50) - 30));
  if (special != 0) x[static_cast<std::size_t>(rows / 2 * stride + cols / 2)] = T(special);
  std::vector<float> plain;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) plain.push_back(static_cast<float>(x[static_cast<std::size_t>(r * stride + c)]));
  const Want want = expected<F>(plain, rows, cols, scaling);
  const Buffer<T> from(x, shift);
  const std::string name = std::string("quantize ") + type_name<T>() + (std::is_same_v<F, k::E4M3> ? " e4m3 " : " e5m2 ") +
                           (scaling == k::Scaling::block ? "blocks " : "") + std::to_string(rows) + " x " +
                           std::to_string(cols) + (more + shift != 0 ? " apart" : "") + (special != 0 ? " not finite" : "");
  for (const int parts : {3, 1, 2}) {
    if (parts != 3 && !parts_alone) break;
    Buffer<std::uint8_t> data(rows * cols), scale(static_cast<std::int64_t>(want.scale.size())), turned(cols * length),
        turned_scale(static_cast<std::int64_t>(want.turned_scale.size()));
    k::Quantize q;
    q.from = num_of<T>(), q.to = std::is_same_v<F, k::E4M3> ? Num::f8e4m3 : Num::f8e5m2, q.scaling = scaling;
    q.rows = rows, q.cols = cols, q.stride = stride, q.x = from.data();
    const bool straight = (parts & 1) != 0, over = (parts & 2) != 0, blocks = scaling == k::Scaling::block;
    if (straight) q.data = data.data();
    if (straight || !blocks) q.scale = scale.data();
    if (over) q.turned = turned.data(), q.turned_scale = blocks ? turned_scale.data() : scale.data();
    cuda::quantize(ctx, q);
    if (straight) same_bits(name, data.get(), want.data);
    if (straight || !blocks) same_bits(name + " scale", scale.get(), want.scale);
    if (over) same_bits(name + " turned", turned.get(), want.turned);
    if (over && blocks) same_bits(name + " turned scale", turned_scale.get(), want.turned_scale);
    report(data.guarded() && scale.guarded() && turned.guarded() && turned_scale.guarded(),
           name + " stays within its memory");
  }
}

template <class T, class F>
void matrices(Context& ctx, bool small) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const k::Scaling scaling : {k::Scaling::tensor, k::Scaling::block}) {
    const std::int64_t unit = k::fp8_multiple(scaling);
    matrix<T, F>(ctx, 70, 5 * unit, 0, 0, scaling, 0);
    matrix<T, F>(ctx, 33, 4 * unit, 5, 0, scaling, 0, false);
    matrix<T, F>(ctx, 33, 4 * unit, 16, 3, scaling, 0, false);
    for (const float special : {infinity, nan}) matrix<T, F>(ctx, 40, 3 * unit, 0, 0, scaling, special, false);
    if (small) continue;
    for (const std::int64_t rows : {1, 33, 64, 130})
      for (const std::int64_t units : {1, 3, 5}) matrix<T, F>(ctx, rows, units * unit, 0, 0, scaling, 0);
    for (const float special : {-infinity, -nan, -0.0f}) matrix<T, F>(ctx, 40, 3 * unit, 0, 0, scaling, special);
    matrix<T, F>(ctx, 16, 512 * unit, 0, 0, scaling, 0);
    matrix<T, F>(ctx, 4096, 768, 0, 0, scaling, 0);
    matrix<T, F>(ctx, 2049, 4096, 0, 0, scaling, 0);
  }
}

}  // namespace

void test_fp8(Context& ctx, bool small) {
  matrices<bf16, k::E4M3>(ctx, small);
  matrices<bf16, k::E5M2>(ctx, small);
  matrices<float, k::E4M3>(ctx, small);
  matrices<float, k::E5M2>(ctx, small);
}

}  // namespace gpu_test
