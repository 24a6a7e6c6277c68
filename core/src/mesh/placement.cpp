// Which elements a tensor rank holds: segments on tensor axes are cut, everything else is whole.
#include "mesh/placement.h"

#include <capstan/error.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <string>

namespace capstan {

namespace {

constexpr std::array<std::string_view, 4> axes{"heads", "kv_heads", "mlp", "vocab"};

bool on_tensor_axis(const Segment& segment) { return std::find(axes.begin(), axes.end(), segment.axis) != axes.end(); }

/// Into how many pieces the segment falls.
int ways_of(const Parameter& parameter, const std::vector<Segment>& dim, const Segment& segment, int size) {
  if (segment.axis == "vocab") return size;
  std::int64_t groups = segment.groups;
  if (groups == 0 && segment.axis == "heads")  // beside the keys and values that they read
    for (const Segment& other : dim)
      if (other.axis == "kv_heads") groups = other.count;
  if (groups == 0) return static_cast<int>(std::gcd(segment.count, static_cast<std::int64_t>(size)));
  if (groups < 0 || segment.count % groups != 0)
    fail(Fault::programming, parameter.name(),
         "segment on axis '" + segment.axis + "': expected a count that is a multiple of its groups, got " +
             std::to_string(segment.count) + " and " + std::to_string(groups));
  // Either whole groups to a rank, or every group over equally many ranks: a rank then needs one group's keys alone.
  return static_cast<int>(std::gcd(size % groups == 0 ? segment.count : groups, static_cast<std::int64_t>(size)));
}

}  // namespace

std::span<const std::string_view> tensor_axes() { return axes; }

std::int64_t TensorPlacement::extent(const Parameter& parameter, std::string_view part) const {
  const std::vector<Segment>& segments = parameter.spec().dims[static_cast<std::size_t>(cut() ? dim : 0)];
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < segments.size(); ++i)
    if (segments[i].part == part) sum += cut() ? runs[i].length : segments[i].extent();
  return sum;
}

TensorPlacement place_tensor(const Parameter& parameter, int size, int rank) {
  if (size < 1 || rank < 0 || rank >= size)
    fail(Fault::programming, parameter.name(),
         "tensor rank: expected one of [0, " + std::to_string(size) + "), got " + std::to_string(rank));
  TensorPlacement p;
  p.size = size, p.rank = rank, p.local = parameter.shape();
  const auto& dims = parameter.spec().dims;
  if (size > 1)
    for (std::size_t d = 0; d < dims.size(); ++d) {
      if (std::none_of(dims[d].begin(), dims[d].end(), on_tensor_axis)) continue;
      if (p.cut())
        fail(Fault::input, parameter.name(),
             "dimensions " + std::to_string(p.dim) + " and " + std::to_string(d) +
                 " both lie on axes that tensor ranks cut (heads, kv_heads, mlp, vocab), expected one: "
                 "name the other axis otherwise, or train without a tensor axis");
      p.dim = static_cast<int>(d);
    }
  if (!p.cut()) {
    p.runs = {{0, p.local.size() == 0 ? 1 : p.local[0], 1}};
    return p;
  }
  const std::vector<Segment>& dim = dims[static_cast<std::size_t>(p.dim)];
  std::int64_t begin = 0, length = 0;
  for (const Segment& s : dim) {
    const int ways = on_tensor_axis(s) ? ways_of(parameter, dim, s, size) : 1;
    const std::int64_t most = (s.count + ways - 1) / ways, first = std::min(most * (rank / (size / ways)), s.count);
    p.runs.push_back({begin + first * s.width, std::min(most, s.count - first) * s.width, ways});
    begin += s.extent(), length += p.runs.back().length;
  }
  p.local[p.dim] = length;
  return p;
}

}  // namespace capstan
