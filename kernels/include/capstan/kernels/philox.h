// defines: Philox4x32-10 and the uniform and normal formulas over it. Host and device give the same bits:
// only integer steps, IEEE + - * / sqrt and explicit fma (build without contraction and fast-math).
#pragma once
#include <capstan/kernels/bf16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace capstan::kernels {

/// SplitMix64's finalizer (Steele et al. 2014).
CAPSTAN_HD constexpr std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

struct Philox4 { std::uint32_t v[4]; };

/// Ten rounds on the counter (index, step) under `key` (Salmon et al., SC 2011).
CAPSTAN_HD constexpr Philox4 philox4x32_10(std::uint64_t key, std::uint64_t step, std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index), c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(step), c3 = static_cast<std::uint32_t>(step >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(b), c3 = static_cast<std::uint32_t>(a), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// Element `index` of the stream: four neighbours share one Philox block.
CAPSTAN_HD constexpr std::uint32_t philox_u32(std::uint64_t key, std::uint64_t step, std::uint64_t index) {
  return philox4x32_10(key, step, index >> 2).v[index & 3];
}

/// Uniform in (0, 1): 32 bits, centred, never 0 or 1.
CAPSTAN_HD inline double philox_uniform(std::uint64_t key, std::uint64_t step, std::uint64_t index) {
  return (static_cast<double>(philox_u32(key, step, index)) + 0.5) * 0x1p-32;
}

/// Natural logarithm of a positive normal double by range reduction and an atanh series (relative error
/// under 1e-15); built from IEEE operations only, unlike libm's.
CAPSTAN_HD inline double exact_log(double x) {
  std::uint64_t u;
  std::memcpy(&u, &x, 8);
  int e = static_cast<int>(u >> 52) - 1023;
  u = (u & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  double m;
  std::memcpy(&m, &u, 8);
  if (m > 1.4142135623730951) m *= 0.5, ++e;
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 23;
  for (int k = 21; k >= 1; k -= 2) p = fma(p, z, 1.0 / k);
  return fma(static_cast<double>(e), 0.6931471805599453, 2.0 * s * p);
}

/// Normal quantile, algorithm AS241 PPND16 (Wichura, Applied Statistics 37, 1988), relative error 1e-16.
CAPSTAN_HD inline double normal_quantile(double p) {
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    double n = 2509.0809287301226727, d = 5226.495278852545925;
    n = fma(n, r, 33430.575583588128105), d = fma(d, r, 28729.085735721942674);
    n = fma(n, r, 67265.770927008700853), d = fma(d, r, 39307.89580009271061);
    n = fma(n, r, 45921.953931549871457), d = fma(d, r, 21213.794301586595867);
    n = fma(n, r, 13731.693765509461125), d = fma(d, r, 5394.1960214247511077);
    n = fma(n, r, 1971.5909503065514427), d = fma(d, r, 687.1870074920579083);
    n = fma(n, r, 133.14166789178437745), d = fma(d, r, 42.313330701600911252);
    n = fma(n, r, 3.387132872796366608), d = fma(d, r, 1.0);
    return q * n / d;
  }
  double r = sqrt(-exact_log(q < 0 ? p : 1.0 - p)), n, d;
  if (r <= 5.0) {
    r -= 1.6;
    n = 7.7454501427834140764e-4, d = 1.05075007164441684324e-9;
    n = fma(n, r, 0.0227238449892691845833), d = fma(d, r, 5.475938084995344946e-4);
    n = fma(n, r, 0.24178072517745061177), d = fma(d, r, 0.0151986665636164571966);
    n = fma(n, r, 1.27045825245236838258), d = fma(d, r, 0.14810397642748007459);
    n = fma(n, r, 3.64784832476320460504), d = fma(d, r, 0.68976733498510000455);
    n = fma(n, r, 5.7694972214606914055), d = fma(d, r, 1.6763848301838038494);
    n = fma(n, r, 4.6303378461565452959), d = fma(d, r, 2.05319162663775882187);
    n = fma(n, r, 1.42343711074968357734), d = fma(d, r, 1.0);
  } else {
    r -= 5.0;
    n = 2.01033439929228813265e-7, d = 2.04426310338993978564e-15;
    n = fma(n, r, 2.71155556874348757815e-5), d = fma(d, r, 1.4215117583164458887e-7);
    n = fma(n, r, 0.0012426609473880784386), d = fma(d, r, 1.8463183175100546818e-5);
    n = fma(n, r, 0.026532189526576123093), d = fma(d, r, 7.868691311456132591e-4);
    n = fma(n, r, 0.29656057182850489123), d = fma(d, r, 0.0148753612908506148525);
    n = fma(n, r, 1.7848265399172913358), d = fma(d, r, 0.13692988092273580531);
    n = fma(n, r, 5.4637849111641143699), d = fma(d, r, 0.59983220655588793769);
    n = fma(n, r, 6.6579046435011037772), d = fma(d, r, 1.0);
  }
  return q < 0 ? -n / d : n / d;
}

CAPSTAN_HD inline double philox_normal(std::uint64_t key, std::uint64_t step, std::uint64_t index) {
  return normal_quantile(philox_uniform(key, step, index));
}

/// `scale` times a normal, or a uniform in (-1, 1), from one word of a stream.
CAPSTAN_HD inline double random_value(std::uint32_t bits, bool normal, double scale) {
  const double u = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return scale * (normal ? normal_quantile(u) : 2 * u - 1);
}

}  // namespace capstan::kernels
