// defines: tile_gemm(): a small product of register tiles, for attention's 64 x 64 blocks.
#pragma once
#include <kernels/cpu/simd.h>

#include <cstdint>

namespace capstan::kernels::cpu {

/// C[r, v * lanes] (+)= sum_k A(r, k) B[k, v * lanes], R rows and NV vectors in registers. Each element's sum
/// runs over k in order by fma, so it does not depend on R or NV.
template <class A, int R, int NV>
CAPSTAN_INLINE void tile_kernel(std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b, std::int64_t ldb,
                                A* c, std::int64_t ldc, bool accumulate) {
  using V = Vec<A>;
  V acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = accumulate ? V::load(c + r * ldc + v * V::lanes) : V(A(0));
  for (std::int64_t p = 0; p < k; ++p) {
    V row[NV];
    for (int v = 0; v < NV; ++v) row[v] = V::load(b + p * ldb + v * V::lanes);
    for (int r = 0; r < R; ++r) {
      const V x(a[r * a_row + p * a_col]);
      for (int v = 0; v < NV; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v].store(c + r * ldc + v * V::lanes);
}

template <class A, int NV>
void tile_rows(std::int64_t m, std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b, std::int64_t ldb,
               A* c, std::int64_t ldc, bool accumulate) {
  constexpr int R = NV >= 4 ? 6 : 8;
  std::int64_t r = 0;
  for (; r + R <= m; r += R) tile_kernel<A, R, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  for (; r + 2 <= m; r += 2) tile_kernel<A, 2, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  for (; r < m; ++r) tile_kernel<A, 1, NV>(k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
}

/// C[m, n] (+)= A B with n a multiple of the lanes (pad B and C). A is read at a[i * a_row + k * a_col].
template <class A>
void tile_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col, const A* b,
               std::int64_t ldb, A* c, std::int64_t ldc, bool accumulate) {
  constexpr std::int64_t lanes = Vec<A>::lanes;
  std::int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) tile_rows<A, 4>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  for (; j + 2 * lanes <= n; j += 2 * lanes) tile_rows<A, 2>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  for (; j < n; j += lanes) tile_rows<A, 1>(m, k, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
}

/// Copies rows x cols of a strided T matrix into a padded A matrix; columns up to `padded` are zero.
template <class A, class T>
void load_tile(std::int64_t rows, std::int64_t cols, std::int64_t padded, const T* from, std::int64_t stride, A* to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t c = 0;
    for (; c < cols; ++c) to[r * padded + c] = static_cast<A>(from[r * stride + c]);
    for (; c < padded; ++c) to[r * padded + c] = A(0);
  }
}

/// The same, transposed: to[c * padded + r] = from[r, c]; rows up to `padded` are zero.
template <class A, class T>
void load_tile_transposed(std::int64_t rows, std::int64_t cols, std::int64_t padded, const T* from, std::int64_t stride, A* to) {
  for (std::int64_t c0 = 0; c0 < cols; c0 += 16) {
    const std::int64_t c1 = c0 + 16 < cols ? c0 + 16 : cols;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = c0; c < c1; ++c) to[c * padded + r] = static_cast<A>(from[r * stride + c]);
  }
  for (std::int64_t c = 0; c < cols; ++c)
    for (std::int64_t r = rows; r < padded; ++r) to[c * padded + r] = A(0);
}

}  // namespace capstan::kernels::cpu
