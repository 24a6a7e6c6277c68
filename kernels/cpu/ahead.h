// defines: Ahead, tile_gemm() with it: rows of memory asked for in small portions while products run, so that they are in
// the second-level cache when their turn comes.
#pragma once
#include <kernels/cpu/tile_gemm.h>

#include <algorithm>
#include <cstdint>

namespace capstan::kernels::cpu {

inline constexpr std::int64_t tile_step = 6;  // rows of a register tile

/// A queue of strided rows that are about to be written: their lines then need not be fetched at the store. Rows of one
/// head lie kilobytes apart, where the hardware does not look ahead; asking for many at once would only stall.
class Ahead {
 public:
  void clear() { count_ = at_ = 0, row_ = 0; }

  template <class T>
  void add(const T* first, std::int64_t rows, std::int64_t cols, std::int64_t stride) {
    if (count_ == most || rows <= 0) return;
    list_[count_++] = {reinterpret_cast<const char*>(first), stride * static_cast<std::int64_t>(sizeof(T)), cols * static_cast<std::int64_t>(sizeof(T)), rows};
  }

  std::int64_t rows() const {
    std::int64_t n = -row_;
    for (int i = at_; i < count_; ++i) n += list_[i].rows;
    return n;
  }

  CAPSTAN_INLINE void some(std::int64_t rows) {
    for (; rows > 0 && at_ < count_; --rows) {
      const Rows& l = list_[at_];
      const char* p = l.first + row_ * l.stride;
      for (std::int64_t b = 0; b < l.bytes; b += 64) __builtin_prefetch(p + b, 0, 2);
      if (++row_ == l.rows) ++at_, row_ = 0;
    }
  }

 private:
  struct Rows { const char* first; std::int64_t stride, bytes, rows; };
  static constexpr int most = 12;
  Rows list_[most];
  int count_ = 0, at_ = 0;
  std::int64_t row_ = 0;
};

/// tile_gemm a few rows at a time; before each, `portion` rows of `ahead` are asked for.
template <class A>
void tile_gemm(Ahead& ahead, std::int64_t portion, std::int64_t m, std::int64_t n, std::int64_t k, const A* a, std::int64_t a_row, std::int64_t a_col,
               const A* b, std::int64_t ldb, A* c, std::int64_t ldc, bool accumulate) {
  for (std::int64_t r = 0; r < m; r += tile_step) {
    ahead.some(portion);
    tile_gemm<A>(std::min(tile_step, m - r), n, k, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  }
}

}  // namespace capstan::kernels::cpu
