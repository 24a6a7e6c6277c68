// Boxes of global tensors: the whole of resharding is intersect() and copy_common().
#include "checkpoint/boxes.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace capstan::checkpoint {

std::optional<std::int64_t> volume(std::span<const std::int64_t> extents) {
  std::int64_t product = 1;
  bool empty = false;
  for (const auto extent : extents) {
    if (extent < 0) return std::nullopt;
    if (extent == 0)
      empty = true;
    else if (__builtin_mul_overflow(product, extent, &product))
      return std::nullopt;
  }
  return empty ? 0 : product;
}

Box whole(const Shape& shape) { return {Shape(shape.size(), 0), shape}; }

bool inside(const Box& box, const Shape& shape) {
  if (box.begin.size() != shape.size() || box.extent.size() != shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (box.begin[i] < 0 || box.extent[i] < 0 || box.begin[i] > shape[i] || box.extent[i] > shape[i] - box.begin[i]) {
      return false;
    }
  }
  return true;
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  Box common{Shape(a.begin.size()), Shape(a.begin.size())};
  for (std::size_t i = 0; i < a.begin.size(); ++i) {
    const auto from = std::max(a.begin[i], b.begin[i]);
    const auto to = std::min(a.begin[i] + a.extent[i], b.begin[i] + b.extent[i]);
    if (from >= to) return std::nullopt;
    common.begin[i] = from, common.extent[i] = to - from;
  }
  return common;
}

std::string tiling_fault(const Shape& shape, std::span<const Box> boxes) {
  // Disjoint boxes inside the shape cover it exactly when their volumes add up to its own.
  std::int64_t covered = 0;
  for (const auto& box : boxes) {
    if (!inside(box, shape)) return "box " + text_of(box) + " is not inside the global shape " + text_of(shape);
    if (__builtin_add_overflow(covered, *volume(box.extent), &covered)) return "the boxes overlap";
  }
  // Sorted by the first dimension only neighbours in it can overlap.
  std::vector<std::size_t> order(boxes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (!shape.empty()) {
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return boxes[a].begin[0] < boxes[b].begin[0]; });
  }
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto& a = boxes[order[i]];
    for (std::size_t j = i + 1; j < order.size(); ++j) {
      const auto& b = boxes[order[j]];
      if (!shape.empty() && b.begin[0] >= a.begin[0] + a.extent[0]) break;
      if (intersect(a, b)) return "boxes " + text_of(a) + " and " + text_of(b) + " overlap";
    }
  }
  const auto total = *volume(shape);
  if (covered != total) {
    return "the boxes leave " + std::to_string(total - covered) + " of " + std::to_string(total) + " elements uncovered";
  }
  return {};
}

void copy_common(const Box& source_box, const void* source, const Box& target_box, void* target,
                 std::int64_t element_bytes) {
  const auto common = intersect(source_box, target_box);
  if (!common) return;
  const auto rank = common->extent.size();
  Shape source_stride(rank), target_stride(rank);
  for (std::int64_t s = element_bytes, t = element_bytes, i = static_cast<std::int64_t>(rank) - 1; i >= 0; --i) {
    const auto d = static_cast<std::size_t>(i);
    source_stride[d] = s, target_stride[d] = t;
    s *= source_box.extent[d], t *= target_box.extent[d];
  }
  const auto* from = static_cast<const char*>(source);
  auto* to = static_cast<char*>(target);
  for (std::size_t d = 0; d < rank; ++d) {
    from += (common->begin[d] - source_box.begin[d]) * source_stride[d];
    to += (common->begin[d] - target_box.begin[d]) * target_stride[d];
  }
  // Dimension `outer` and all after it form one contiguous run in both buffers.
  auto outer = rank;
  std::int64_t run = element_bytes;
  while (outer > 0) {
    --outer;
    run *= common->extent[outer];
    if (common->extent[outer] != source_box.extent[outer] || common->extent[outer] != target_box.extent[outer]) break;
  }
  Shape index(outer, 0);
  for (;;) {
    std::memcpy(to, from, static_cast<std::size_t>(run));
    auto d = outer;
    for (; d > 0; --d) {
      from += source_stride[d - 1], to += target_stride[d - 1];
      if (++index[d - 1] < common->extent[d - 1]) break;
      from -= source_stride[d - 1] * common->extent[d - 1], to -= target_stride[d - 1] * common->extent[d - 1];
      index[d - 1] = 0;
    }
    if (d == 0) return;
  }
}

std::string text_of(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string text_of(const Box& box) {
  std::string text = "[";
  for (std::size_t i = 0; i < box.begin.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(box.begin[i]) + ":";
    text += i < box.extent.size() ? std::to_string(box.begin[i] + box.extent[i]) : "?";
  }
  return text + "]";
}

}  // namespace capstan::checkpoint
