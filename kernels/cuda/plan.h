// defines: how element and reduction kernels are laid out on a GPU: vector widths, grids, chunks. Plain host code, tested
// without a GPU.
#pragma once
#include <kernels/shapes.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace capstan::kernels::cuda {

inline constexpr std::int64_t most_blocks_x = 0x7fffffff, most_blocks_yz = 65535;
inline constexpr int elementwise_block = 256;

inline std::int64_t blocks_for(std::int64_t n, std::int64_t per) { return (n + per - 1) / per; }

/// Elements that one thread loads at once: 16 bytes of the type with `element` bytes where every address allows it, else one.
inline int vector_width(std::int64_t element, std::initializer_list<const void*> addresses) {
  for (const void* p : addresses)
    if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) return 1;
  return static_cast<int>(16 / element);
}

/// A grid of one-dimensional blocks for n items. Kernels walk with the grid's stride where there are more.
struct Grid { std::int64_t blocks; };
inline Grid grid_for(std::int64_t items, std::int64_t per_block) { return {std::min<std::int64_t>(blocks_for(items, per_block), most_blocks_x)}; }

/// A strided copy in units of `unit` bytes: same-type copies move the widest unit that both sides' last dimension,
/// steps and addresses allow. In units of that size; rank at least 1.
struct CopyPlan { Strided shape; std::int64_t unit; };
inline CopyPlan copy_plan(const Strided& s, std::int64_t element, const void* to, const void* from) {
  CopyPlan p{merged(s), element};
  const int last = p.shape.rank - 1;
  if (p.shape.to[last] != 1 || p.shape.from[last] != 1) return p;
  for (std::int64_t unit = 16; unit > element; unit /= 2) {
    const std::int64_t k = unit / element;
    bool fits = p.shape.shape[last] % k == 0 && reinterpret_cast<std::uintptr_t>(to) % static_cast<std::uintptr_t>(unit) == 0 &&
                reinterpret_cast<std::uintptr_t>(from) % static_cast<std::uintptr_t>(unit) == 0;
    for (int d = 0; d < last; ++d) fits = fits && p.shape.to[d] % k == 0 && p.shape.from[d] % k == 0;
    if (!fits) continue;
    p.unit = unit;
    p.shape.shape[last] /= k;
    for (int d = 0; d < last; ++d) p.shape.to[d] /= k, p.shape.from[d] /= k;
    return p;
  }
  return p;
}

/// A sum over the middle of [outer, n, inner]: n is cut into `chunks` of `length`, each summed by one block (or thread,
/// for columns); the chunks' sums are added in order by a second pass when there is more than one. A function of the
/// shape alone, so that sums are the same on every GPU.
struct ReducePlan { std::int64_t chunks, length; };
inline ReducePlan reduce_plan(std::int64_t outer, std::int64_t n, std::int64_t inner) {
  // Enough chunks to fill a large GPU (about 1000 blocks), of at least 64 elements (columns) or 2048 (rows), at most 256.
  const std::int64_t parallel = inner == 1 ? outer : outer * blocks_for(inner, 64);
  const std::int64_t least = inner == 1 ? 2048 : 64;
  std::int64_t chunks = std::clamp<std::int64_t>(blocks_for(1024, std::max<std::int64_t>(parallel, 1)), 1, 256);
  chunks = std::max<std::int64_t>(1, std::min(chunks, blocks_for(n, least)));
  const std::int64_t length = blocks_for(std::max<std::int64_t>(n, 1), chunks);
  return {blocks_for(std::max<std::int64_t>(n, 1), length), length};
}

/// Blocks that sum the squares of n numbers: a function of n alone.
inline constexpr std::int64_t most_square_blocks = 1024;
inline std::int64_t square_blocks(std::int64_t n) { return std::clamp<std::int64_t>(blocks_for(n, 16384), 1, most_square_blocks); }

}  // namespace capstan::kernels::cuda
