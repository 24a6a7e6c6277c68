#include "engine/boxes.h"

#include <algorithm>

namespace capstan {

namespace {

using Coordinates = std::vector<std::int64_t>;

struct Shape {
  const Dims& dims;
  std::int64_t below(int dim) const {  // elements of one step along `dim`
    std::int64_t n = 1;
    for (int i = dim + 1; i < dims.size(); ++i) n *= dims[i];
    return n;
  }
};

/// Elements [begin, end) counted within `prefix`: a part of a row, whole rows, a part of a row.
void decompose(const Shape& shape, int dim, const Coordinates& prefix, std::int64_t begin, std::int64_t end, std::vector<LocalBox>& to) {
  if (begin >= end) return;
  const std::int64_t row = shape.below(dim);
  const auto box = [&](std::int64_t first, std::int64_t count) {
    LocalBox b;
    b.begin = prefix, b.extent.assign(prefix.size(), 1);
    b.begin.push_back(first), b.extent.push_back(count);
    for (int i = dim + 1; i < shape.dims.size(); ++i) b.begin.push_back(0), b.extent.push_back(shape.dims[i]);
    to.push_back(std::move(b));
  };
  const auto inside = [&](std::int64_t index, std::int64_t from, std::int64_t until) {
    Coordinates deeper = prefix;
    deeper.push_back(index);
    decompose(shape, dim + 1, deeper, from, until, to);
  };
  std::int64_t first = begin / row;
  const std::int64_t last = end / row;
  if (begin % row != 0) {
    inside(first, begin % row, std::min(row, end - first * row));
    ++first;
  }
  if (last > first) box(first, last - first);
  if (last >= first && end % row != 0) inside(last, 0, end % row);
}

std::int64_t flat(const Shape& shape, const Coordinates& at) {
  std::int64_t i = 0;
  for (int d = 0; d < shape.dims.size(); ++d) i = i * shape.dims[d] + at[static_cast<std::size_t>(d)];
  return i;
}

/// Splits a local box at the runs that it meets and moves it to global coordinates.
void globalize(const Shape& shape, const TensorPlacement& placement, LocalBox box, std::vector<LocalBox>& to) {
  const auto d = static_cast<std::size_t>(std::max(placement.dim, 0));
  const std::int64_t low = box.begin[d], high = low + box.extent[d];
  std::int64_t start = 0;
  int met = 0;
  for (const Run& run : placement.runs) {
    met += std::max(start, low) < std::min(start + run.length, high);
    start += run.length;
  }
  if (met > 1)
    for (std::size_t i = 0; i < d; ++i) {
      if (box.extent[i] == 1) continue;
      for (std::int64_t k = 0; k < box.extent[i]; ++k) {  // elements of several rows are not one run of memory
        LocalBox row = box;
        row.begin[i] += k, row.extent[i] = 1;
        globalize(shape, placement, std::move(row), to);
      }
      return;
    }
  start = 0;
  for (const Run& run : placement.runs) {
    const std::int64_t from = std::max(start, low), until = std::min(start + run.length, high);
    if (from < until) {
      LocalBox part = box;
      part.begin[d] = from, part.extent[d] = until - from;
      part.at = flat(shape, part.begin);
      part.begin[d] += run.begin - start;
      part.owned = placement.owns(run);
      to.push_back(std::move(part));
    }
    start += run.length;
  }
}

}  // namespace

std::vector<LocalBox> boxes_of(const Dims& dims, const TensorPlacement* placement, std::int64_t begin, std::int64_t end) {
  const Shape shape{dims};
  std::vector<LocalBox> local;
  if (dims.size() == 0) {
    if (begin < end) local.push_back({});
    return local;
  }
  decompose(shape, 0, {}, begin, end, local);
  std::vector<LocalBox> all;
  for (LocalBox& b : local) {
    b.at = flat(shape, b.begin);
    if (placement == nullptr) all.push_back(std::move(b));
    else globalize(shape, *placement, std::move(b), all);
  }
  return all;
}

}  // namespace capstan
