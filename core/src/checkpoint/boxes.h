// defines: arithmetic on boxes of a global tensor: intersection, coverage, and the copy between two boxes.
#pragma once
#include <capstan/checkpoint.h>
#include <capstan/export.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

namespace capstan::checkpoint {

using Shape = std::vector<std::int64_t>;

/// Number of elements, or nothing when an extent is negative or the product does not fit 63 bits.
CAPSTAN_API std::optional<std::int64_t> volume(std::span<const std::int64_t> extents);
/// The box of the whole tensor.
CAPSTAN_API Box whole(const Shape& shape);
/// Whether `box` has the shape's rank and lies inside it.
CAPSTAN_API bool inside(const Box& box, const Shape& shape);
/// The common part; nothing when it is empty. A tensor of rank 0 is one element. Ranks must agree.
CAPSTAN_API std::optional<Box> intersect(const Box& a, const Box& b);
/// Why the boxes do not tile `shape` exactly once ("overlap ...", "leave ... uncovered"), or "".
CAPSTAN_API std::string tiling_fault(const Shape& shape, std::span<const Box> boxes);
/// Copies the elements that both boxes hold from one row-major buffer to the other.
CAPSTAN_API void copy_common(const Box& source_box, const void* source, const Box& target_box, void* target,
                             std::int64_t element_bytes);

/// "[4, 256]" and "[0:4, 128:256]".
CAPSTAN_API std::string text_of(std::span<const std::int64_t> shape);
CAPSTAN_API std::string text_of(const Box& box);

}  // namespace capstan::checkpoint
