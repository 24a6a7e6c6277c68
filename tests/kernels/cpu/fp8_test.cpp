// fp8: conversions against a plain reference and NVIDIA's own, scales, layouts, quantized matrices, products.
#include <gtest/gtest.h>
#include <kernels/cpu/backend.h>
#include <kernels/shared/fp8.h>
#include <support/tolerance.h>

#if defined(CAPSTAN_CUDA_FP8)
#include <cuda_fp8.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

namespace capstan::kernels {
namespace {

/// A format in the words of the OCP 8-bit floating point specification, and nothing of the code under test.
struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool infinities;
  double value(int code) const {
    const int e = code >> mantissa_bits & ((1 << exponent_bits) - 1), m = code & ((1 << mantissa_bits) - 1),
              all = (1 << exponent_bits) - 1;
    const double sign = code & 0x80 ? -1 : 1;
    if (infinities && e == all) return m == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
    if (!infinities && e == all && m == (1 << mantissa_bits) - 1) return std::nan("");
    if (e == 0) return sign * std::ldexp(m, 1 - bias - mantissa_bits);
    return sign * std::ldexp((1 << mantissa_bits) + m, e - bias - mantissa_bits);
  }
  int largest() const { return infinities ? 0x7b : 0x7e; }
  /// To nearest, ties to the even code, saturating; -1 for NaN.
  int encode(double x) const {
    if (std::isnan(x)) return -1;
    const double a = std::min(std::abs(x), value(largest()));
    int code = 0, above_all = largest() + 1;  // value(code) <= a < value(above_all)
    while (above_all - code > 1) (value((code + above_all) / 2) <= a ? code : above_all) = (code + above_all) / 2;
    if (code < largest()) {
      const double below = a - value(code), above = value(code + 1) - a;
      if (above < below || (above == below && code % 2 == 1)) ++code;
    }
    return code | (std::signbit(x) ? 0x80 : 0);
  }
};
constexpr Format e4m3{4, 3, 7, false}, e5m2{5, 2, 15, true};

template <class F>
const Format& format_of() {
  return std::is_same_v<F, E4M3> ? e4m3 : e5m2;
}

/// Every brain float, every number halfway between two neighbours and those beside it, and random ones.
std::vector<float> many_floats() {
  std::vector<float> all;
  for (std::uint32_t i = 0; i < 65536; ++i) all.push_back(float_of(i << 16));
  for (const Format& f : {e4m3, e5m2})
    for (int code = 0; code <= f.largest(); ++code) {
      const auto half =
          static_cast<float>(code < f.largest() ? (f.value(code) + f.value(code + 1)) / 2 : f.value(code) * 1.0625);
      for (const float x : {half, static_cast<float>(f.value(code))})
        for (const float y : {x, std::nextafter(x, 1e30f), std::nextafter(x, -1e30f), -x}) all.push_back(y);
    }
  std::mt19937 g(1);
  for (int i = 0; i < 300000; ++i) all.push_back(float_of(static_cast<std::uint32_t>(g())));
  for (int i = 0; i < 300000; ++i) all.push_back(std::ldexp(static_cast<float>(g()), -static_cast<int>(g() % 56)));
  return all;
}

template <class F>
void round_as_the_reference() {
  const Format& f = format_of<F>();
  for (const float x : many_floats()) {
    const int want = f.encode(x), got = to_fp8<F>(x);
    if (want < 0) {
      ASSERT_TRUE(std::isnan(f.value(got))) << x;
    } else {
      ASSERT_EQ(got, want) << x;
    }
  }
  for (int code = 0; code < 256; ++code) {
    const double value = f.value(code);
    const float got = from_fp8<F>(static_cast<std::uint8_t>(code));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(got));
    } else {
      EXPECT_EQ(static_cast<double>(got), value) << code;
    }
    EXPECT_EQ(std::signbit(got), code >= 128);
  }
  EXPECT_EQ(to_fp8<F>(std::numeric_limits<float>::infinity()), F::largest);
}
TEST(Fp8, RoundsToNearestEvenAndSaturates) {
  round_as_the_reference<E4M3>();
  round_as_the_reference<E5M2>();
}

#if defined(CAPSTAN_CUDA_FP8)
TEST(Fp8, IsNvidiasToTheBit) {
  for (const float x : many_floats())
    for (const bool wide : {false, true}) {
      const int theirs = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, wide ? __NV_E5M2 : __NV_E4M3),
                mine = wide ? to_fp8<E5M2>(x) : to_fp8<E4M3>(x);
      if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan((wide ? e5m2 : e4m3).value(theirs)) && std::isnan((wide ? e5m2 : e4m3).value(mine)));
      } else {
        ASSERT_EQ(mine, theirs) << x;
      }
    }
  // Scales round up: where amax is 448 v exactly, the scale is what v becomes in e8m0.
  std::mt19937 g(2);
  for (int i = 0; i < 200000; ++i) {
    const float v = std::ldexp(static_cast<float>(g() >> 12), static_cast<int>(g() % 200) - 130), amax = v * 448;
    if (!std::isfinite(amax) || static_cast<double>(amax) != static_cast<double>(v) * 448 || !(v > 0) || v < 0x1p-126f)
      continue;
    ASSERT_EQ(scale_code<E4M3>(bits_of(amax)), __nv_cvt_float_to_e8m0(v, __NV_SATFINITE, cudaRoundPosInf)) << v;
  }
  for (int code = 0; code < 256; ++code) {
    const float theirs = static_cast<float>(
        static_cast<__nv_bfloat16>(__nv_bfloat16_raw(__nv_cvt_e8m0_to_bf16raw(static_cast<__nv_fp8_storage_t>(code)))));
    if (code == 255) {
      EXPECT_TRUE(std::isnan(theirs) && std::isnan(e8m0_value(255)));
    } else {
      EXPECT_EQ(e8m0_value(static_cast<std::uint32_t>(code)), theirs) << code;
    }
  }
}
#endif

template <class F>
void scale_is_the_least_that_fits() {
  const double largest = format_of<F>().value(format_of<F>().largest());
  for (float amax : many_floats()) {
    amax = std::abs(amax);
    const std::uint32_t code = scale_code<F>(bits_of(amax));
    if (!std::isfinite(amax)) {
      ASSERT_EQ(code, 255u);
      ASSERT_TRUE(std::isnan(e8m0_value(code)) && std::isnan(e8m0_inverse(code)));
      continue;
    }
    if (amax == 0) {
      ASSERT_EQ(e8m0_value(code), 1);
      continue;
    }
    const double scale = e8m0_value(code);
    ASSERT_EQ(scale * static_cast<double>(e8m0_inverse(code)), 1);
    ASSERT_LE(amax, largest * scale);
    if (code > 0) {
      ASSERT_GT(amax, largest * scale / 2) << amax;
    }
  }
}
TEST(Fp8, ScaleIsTheLeastPowerOfTwoThatFits) {
  scale_is_the_least_that_fits<E4M3>();
  scale_is_the_least_that_fits<E5M2>();
}

TEST(Fp8, BlockScalesLieInTilesOf128By4) {
  EXPECT_EQ(block_scale_at(33, 2, 4), 16 + 4 + 2);
  for (const auto& [rows, blocks] : {std::pair{1, 1}, {32, 4}, {128, 4}, {129, 5}, {300, 11}, {1000, 3}}) {
    // As a permutation: rows and blocks padded to tiles; a tile's four groups of 32 rows side by side.
    const int tile_cols = (blocks + 3) / 4;
    std::set<std::int64_t> seen;
    std::int64_t at = 0;
    for (int tile_row = 0; tile_row < (rows + 127) / 128; ++tile_row)
      for (int tile_col = 0; tile_col < tile_cols; ++tile_col)
        for (int r = 0; r < 32; ++r)
          for (int group = 0; group < 4; ++group)
            for (int b = 0; b < 4; ++b, ++at) {
              const int row = tile_row * 128 + group * 32 + r, block = tile_col * 4 + b;
              if (row >= rows || block >= blocks) continue;
              ASSERT_EQ(block_scale_at(row, block, blocks), at);
              seen.insert(at);
            }
    EXPECT_EQ(seen.size(), static_cast<std::size_t>(rows * blocks));
    EXPECT_EQ(at, scale_bytes(Scaling::block, rows, blocks * 32));
  }
}

TEST(Fp8, PartsOfAMatrixDoNotOverlap) {
  for (const Scaling scaling : {Scaling::tensor, Scaling::block})
    for (const bool turned : {false, true}) {
      const Fp8Places p = fp8_places(scaling, 96, 160, true, turned);
      std::vector<std::pair<std::int64_t, std::int64_t>> parts{{p.data, 96 * 160}, {p.scale, scale_bytes(scaling, 96, 160)}};
      if (turned) parts.emplace_back(p.turned, 160 * 96);
      if (turned && scaling == Scaling::block) parts.emplace_back(p.turned_scale, scale_bytes(scaling, 160, 96));
      if (turned && scaling == Scaling::tensor) {
        EXPECT_EQ(p.turned_scale, p.scale);
      }
      std::sort(parts.begin(), parts.end());
      for (std::size_t i = 0; i < parts.size(); ++i) {
        EXPECT_EQ(parts[i].first % 16, 0);
        EXPECT_LE(parts[i].first + parts[i].second, i + 1 < parts.size() ? parts[i + 1].first : p.bytes);
      }
    }
}

struct Quantized {
  std::vector<std::uint8_t> data, scale, turned, turned_scale;
};

template <class T>
Quantized quantize(Backend& backend, const std::vector<T>& x, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                   Num to, Scaling scaling) {
  Quantized out;
  const std::int64_t length = fp8_padded(scaling, rows);
  const auto bytes = [](std::int64_t n) { return std::vector<std::uint8_t>(static_cast<std::size_t>(n), 0xcd); };
  out.data = bytes(rows * cols), out.scale = bytes(scale_bytes(scaling, rows, cols));
  out.turned = bytes(cols * length), out.turned_scale = bytes(scale_bytes(scaling, cols, length));
  Quantize q;
  q.from = std::is_same_v<T, float> ? Num::f32 : Num::bf16, q.to = to, q.scaling = scaling;
  q.rows = rows, q.cols = cols, q.stride = stride, q.x = x.data();
  q.data = out.data.data(), q.scale = out.scale.data(), q.turned = out.turned.data(),
  q.turned_scale = out.turned_scale.data();
  backend.quantize(q);
  return out;
}

double scale_of(const std::vector<std::uint8_t>& scales, Scaling scaling, std::int64_t row, std::int64_t block,
                std::int64_t blocks) {
  if (scaling == Scaling::block) {
    const int code = scales[static_cast<std::size_t>(block_scale_at(row, block, blocks))];
    return code == 255 ? std::nan("") : std::ldexp(1, code - 127);
  }
  float s = 0;
  std::memcpy(&s, scales.data(), 4);
  return s;
}

/// Rows of what a matrix became, against the plain meaning: each group's scale from its largest magnitude, each number to
/// nearest.
void check_lines(const std::vector<double>& x, std::int64_t lines, std::int64_t length,
                 const std::vector<std::uint8_t>& data, const std::vector<std::uint8_t>& scales, Scaling scaling,
                 const Format& f) {
  const double top = f.value(f.largest());
  const auto group_scale = [&](const std::vector<double>& group) {
    double amax = 0;
    for (const double v : group) amax = std::isfinite(v) && std::isfinite(amax) ? std::max(amax, std::abs(v)) : std::nan("");
    if (std::isnan(amax)) return amax;
    if (amax == 0) return 1.0;
    int e = -127;
    while (amax > std::ldexp(top, e)) ++e;
    return std::ldexp(1, e);
  };
  const std::int64_t group = scaling == Scaling::block ? 32 : length;
  const double whole = scaling == Scaling::tensor ? group_scale(x) : 0;
  for (std::int64_t l = 0; l < lines; ++l)
    for (std::int64_t b = 0; b * group < length; ++b) {
      std::vector<double> numbers(x.begin() + l * length + b * group,
                                  x.begin() + l * length + std::min(length, (b + 1) * group));
      const double want = scaling == Scaling::block ? group_scale(numbers) : whole,
                   got = scale_of(scales, scaling, l, b, length / 32);
      if (std::isnan(want)) {
        ASSERT_TRUE(std::isnan(got));
      } else {
        ASSERT_EQ(got, want) << "line " << l << " group " << b;
      }
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        const int code = data[static_cast<std::size_t>(l * length + b * group) + i];
        if (std::isnan(want)) {
          ASSERT_TRUE(std::isnan(f.value(code)));
        } else {
          ASSERT_EQ(code, f.encode(numbers[i] / want)) << "line " << l << " element " << i;
        }
      }
    }
}

template <class T>
void check_matrix(std::int64_t rows, std::int64_t cols, std::int64_t more, Num to, Scaling scaling, double special) {
  cpu::Context context(2);
  cpu::CpuBackend backend(context);
  const std::int64_t stride = cols + more;
  std::mt19937_64 g(static_cast<std::uint64_t>(rows * 131 + cols));
  std::normal_distribution<double> normal;
  std::vector<T> x(static_cast<std::size_t>(rows * stride));
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = T(static_cast<float>(normal(g) * std::ldexp(1, static_cast<int>(i / 37 % 40) - 20)));
  for (std::int64_t r = 0; r < rows; ++r)  // groups of zeros, of tiny and of huge numbers
    for (std::int64_t c = 0; c < cols; ++c) {
      T& v = x[static_cast<std::size_t>(r * stride + c)];
      if (r / 32 == 1 && c / 32 == 1) v = T(0.0f);
      if (r / 32 == 0 && c / 32 == 2) v = T(static_cast<float>(v) * 0x1p-118f);
      if (scaling == Scaling::block && r / 32 == 2 && c / 32 == 0) v = T(static_cast<float>(v) * 0x1p100f);
    }
  if (special != 0) x[static_cast<std::size_t>(rows / 2 * stride + cols / 2)] = T(static_cast<float>(special));
  const Quantized q = quantize(backend, x, rows, cols, stride, to, scaling);
  const Format& f = to == Num::f8e4m3 ? e4m3 : e5m2;
  const std::int64_t length = fp8_padded(scaling, rows);
  std::vector<double> straight(static_cast<std::size_t>(rows * cols)), turned(static_cast<std::size_t>(cols * length), 0.0);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c)
      straight[static_cast<std::size_t>(r * cols + c)] = turned[static_cast<std::size_t>(c * length + r)] =
          static_cast<float>(x[static_cast<std::size_t>(r * stride + c)]);
  SCOPED_TRACE(::testing::Message() << rows << " x " << cols << (scaling == Scaling::block ? " blocks " : " tensor ")
                                    << (to == Num::f8e4m3 ? "e4m3 " : "e5m2 ") << special);
  ASSERT_NO_FATAL_FAILURE(check_lines(straight, rows, cols, q.data, q.scale, scaling, f));
  const std::vector<std::uint8_t>& turned_scale = scaling == Scaling::tensor ? q.scale : q.turned_scale;
  ASSERT_NO_FATAL_FAILURE(check_lines(turned, cols, length, q.turned, turned_scale, scaling, f));
  if (scaling == Scaling::tensor) return;
  std::vector<bool> used(q.scale.size(), false);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t b = 0; b < cols / 32; ++b) used[static_cast<std::size_t>(block_scale_at(r, b, cols / 32))] = true;
  for (std::size_t i = 0; i < used.size(); ++i)
    if (!used[i]) {
      ASSERT_EQ(q.scale[i], 0) << "scale " << i << " pads a tile";
    }
}

TEST(Quantize, IsWhatItSaysOverOddShapes) {
  for (const Num to : {Num::f8e4m3, Num::f8e5m2})
    for (const double special : {0.0, static_cast<double>(std::numeric_limits<float>::infinity()), std::nan("")}) {
      for (const auto& [rows, cols, more] : {std::tuple{1, 16, 0}, {3, 48, 0}, {31, 16, 5}, {67, 80, 0}, {130, 112, 16}}) {
        check_matrix<float>(rows, cols, more, to, Scaling::tensor, special);
        check_matrix<bf16>(rows, cols, more, to, Scaling::tensor, special);
      }
      for (const auto& [rows, cols, more] : {std::tuple{1, 32, 0}, {3, 64, 0}, {31, 32, 5}, {67, 96, 0}, {130, 160, 16}}) {
        check_matrix<float>(rows, cols, more, to, Scaling::block, special);
        check_matrix<bf16>(rows, cols, more, to, Scaling::block, special);
      }
    }
}

/// Dequantized values of lines of a quantized matrix.
std::vector<double> values_of(const std::vector<std::uint8_t>& data, const std::vector<std::uint8_t>& scales,
                              Scaling scaling, std::int64_t lines, std::int64_t length, const Format& f) {
  std::vector<double> out;
  for (std::int64_t l = 0; l < lines; ++l)
    for (std::int64_t i = 0; i < length; ++i)
      out.push_back(f.value(data[static_cast<std::size_t>(l * length + i)]) *
                    scale_of(scales, scaling, l, i / 32, length / 32));
  return out;
}

TEST(GemmFp8, IsTheProductOfTheDequantizedValues) {
  using capstan::bounds::tolerance_of;
  for (const Scaling scaling : {Scaling::tensor, Scaling::block})
    for (const Num b_num : {Num::f8e4m3, Num::f8e5m2})
      for (const Num c_num : {Num::f32, Num::bf16})
        for (const auto& [m, n, k] : {std::tuple{1, 16, 32}, {5, 48, 96}, {33, 32, 160}}) {
          cpu::Context context(1);
          cpu::CpuBackend backend(context);
          std::mt19937_64 g(7);
          std::normal_distribution<double> normal;
          const auto random = [&](std::int64_t count) {
            std::vector<float> v(static_cast<std::size_t>(count));
            for (float& x : v) x = static_cast<float>(normal(g));
            return v;
          };
          const Quantized a = quantize(backend, random(m * k), m, k, k, Num::f8e4m3, scaling),
                          b = quantize(backend, random(n * k), n, k, k, b_num, scaling);
          const std::vector<double> va = values_of(a.data, a.scale, scaling, m, k, e4m3),
                                    vb = values_of(b.data, b.scale, scaling, n, k, b_num == Num::f8e4m3 ? e4m3 : e5m2);
          const std::vector<float> bias32 = random(n), residual32 = random(m * n);
          const auto typed = [&](const std::vector<float>& v) {
            std::vector<std::uint8_t> bytes(v.size() * static_cast<std::size_t>(bytes_of(c_num)));
            for (std::size_t i = 0; i < v.size(); ++i) {
              if (c_num == Num::f32)
                std::memcpy(&bytes[4 * i], &v[i], 4);
              else {
                const bf16 narrow(v[i]);
                std::memcpy(&bytes[2 * i], &narrow, 2);
              }
            }
            return bytes;
          };
          const auto read = [&](const std::vector<std::uint8_t>& bytes, std::size_t i) {
            float v = 0;
            bf16 narrow;
            if (c_num == Num::f32) return std::memcpy(&v, &bytes[4 * i], 4), static_cast<double>(v);
            return std::memcpy(&narrow, &bytes[2 * i], 2), static_cast<double>(static_cast<float>(narrow));
          };
          const auto bias = typed(bias32), residual = typed(residual32);
          for (const int how : {0, 1, 2, 3}) {  // plain, bias, bias and residual, added to what is there
            auto c = typed(std::vector<float>(static_cast<std::size_t>(m * n), how == 3 ? 2.5f : NAN));
            GemmFp8 p;
            p.b = b_num, p.c = c_num, p.scaling = scaling, p.m = m, p.n = n, p.ldc = n, p.k = k, p.a_scale = a.scale.data(),
            p.b_scale = b.scale.data(), p.accumulate = how == 3;
            backend.gemm_fp8(p, a.data.data(), b.data.data(), c.data(), how == 1 || how == 2 ? bias.data() : nullptr,
                             how == 2 ? residual.data() : nullptr);
            std::vector<double> want;
            double most = 0;
            for (int i = 0; i < m; ++i)
              for (int j = 0; j < n; ++j) {
                double sum = how == 3 ? 2.5 : 0;
                for (int l = 0; l < k; ++l)
                  sum += va[static_cast<std::size_t>(i * k + l)] * vb[static_cast<std::size_t>(j * k + l)];
                if (how == 1 || how == 2) sum += read(bias, static_cast<std::size_t>(j));
                if (how == 2) sum += read(residual, static_cast<std::size_t>(i * n + j));
                want.push_back(sum), most = std::max(most, std::abs(sum));
              }
            const auto t = tolerance_of(c_num == Num::f32 ? DType::f32 : DType::bf16);
            for (std::size_t i = 0; i < want.size(); ++i)
              ASSERT_LE(std::abs(read(c, i) - want[i]), t.relative * std::abs(want[i]) + t.scale * most)
                  << m << "x" << n << "x" << k << " how " << how << " element " << i;
          }
        }
}

TEST(GemmFp8, RowsOfBlocksDoNotDependOnTheirCountNorOnThreads) {
  std::mt19937_64 g(3);
  std::normal_distribution<double> normal;
  const std::int64_t m = 37, n = 48, k = 480;
  std::vector<float> x(static_cast<std::size_t>(m * k)), w(static_cast<std::size_t>(n * k));
  for (float& v : x) v = static_cast<float>(normal(g));
  for (float& v : w) v = static_cast<float>(normal(g));
  const auto product = [&](int threads, std::int64_t first, std::int64_t count) {
    cpu::Context context(threads);
    cpu::CpuBackend cpu_backend(context);
    Backend& backend = cpu_backend;
    const std::vector<float> rows(x.begin() + first * k, x.begin() + (first + count) * k);
    const Quantized a = quantize(backend, rows, count, k, k, Num::f8e4m3, Scaling::block),
                    b = quantize(backend, w, n, k, k, Num::f8e4m3, Scaling::block);
    std::vector<float> c(static_cast<std::size_t>(count * n));
    GemmFp8 p;
    p.c = Num::f32, p.scaling = Scaling::block, p.m = count, p.n = p.ldc = n, p.k = k, p.a_scale = a.scale.data(),
    p.b_scale = b.scale.data();
    backend.gemm_fp8(p, a.data.data(), b.data.data(), c.data());
    return c;
  };
  const std::vector<float> all = product(2, 0, m);
  EXPECT_EQ(all, product(1, 0, m));
  EXPECT_EQ(all, product(3, 0, m));
  for (const auto& [first, count] : {std::pair{0, 1}, {5, 2}, {36, 1}, {3, 33}})
    EXPECT_EQ(product(2, first, count), std::vector<float>(all.begin() + first * n, all.begin() + (first + count) * n));
}

}  // namespace
}  // namespace capstan::kernels
