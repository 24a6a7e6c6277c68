// MeshLayout: the arithmetic of named axes. What is wrong with a layout, and what would be right, is in layout_check.cpp.
#include "mesh/layout.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>

namespace capstan {
namespace {

constexpr const char* where = "mesh";

/// Distance in ranks of two neighbours along axis `i`.
int stride(const std::vector<MeshAxis>& axes, std::size_t i) {
  int product = 1;
  for (std::size_t k = i + 1; k < axes.size(); ++k) product *= axes[k].size;
  return product;
}

std::size_t index_of(const std::vector<MeshAxis>& axes, std::string_view name) {
  const auto at = std::find_if(axes.begin(), axes.end(), [&](const MeshAxis& a) { return a.name == name; });
  return static_cast<std::size_t>(at - axes.begin());
}

/// Index of an axis that must be there.
std::size_t known(const std::vector<MeshAxis>& axes, std::string_view name) {
  const std::size_t i = index_of(axes, name);
  if (i < axes.size()) return i;
  std::vector<std::string> names;
  for (const MeshAxis& a : axes) names.push_back(a.name);
  const std::string near = nearest(std::string(name), names);
  fail(Fault::input, where,
       fmt::format("no axis '{}'{}; the axes are {}", name, near.empty() ? "" : ", did you mean '" + near + "'?",
                   names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "))));
}

/// Indices of named axes, each once and in the layout's order, or Error(input).
std::vector<std::size_t> in_order(const std::vector<MeshAxis>& axes, std::span<const std::string_view> names,
                                  const char* what) {
  if (names.empty()) fail(Fault::input, where, fmt::format("{} of no axes: expected one axis or more", what));
  std::vector<std::size_t> indices;
  for (const std::string_view name : names) {
    const std::size_t i = known(axes, name);
    if (!indices.empty() && i == indices.back())
      fail(Fault::input, where, fmt::format("{}: axis '{}' is named twice", what, name));
    if (!indices.empty() && i < indices.back())
      fail(Fault::input, where,
           fmt::format("{}: axis '{}' comes before '{}' in the mesh; name axes in its order", what, name,
                       axes[indices.back()].name));
    indices.push_back(i);
  }
  return indices;
}

int product(const std::vector<MeshAxis>& axes) {
  int p = 1;
  for (const MeshAxis& a : axes) p *= a.size;
  return p;
}

}  // namespace

MeshLayout MeshLayout::make(std::vector<MeshAxis> axes, int world) {
  if (const auto fault = check(axes, world))
    fail(Fault::input, fault->axis.empty() ? where : where + ("." + fault->axis), fault->message);
  MeshLayout layout;
  int rest = world;
  for (const MeshAxis& a : axes)
    if (a.size > 0) rest /= a.size;
  for (MeshAxis& a : axes)
    if (a.size < 0) a.size = rest;
  layout.axes_ = std::move(axes);
  layout.world_ = world;
  return layout;
}

int MeshLayout::size(std::string_view axis) const {
  const std::size_t i = index_of(axes_, axis);
  return i < axes_.size() ? axes_[i].size : 1;
}

bool MeshLayout::has(std::string_view axis) const { return index_of(axes_, axis) < axes_.size(); }

std::vector<int> MeshLayout::coordinate(int rank) const {
  if (rank < 0 || rank >= world_)
    fail(Fault::programming, where, fmt::format("rank {}: expected 0 to {}", rank, world_ - 1));
  std::vector<int> c(axes_.size());
  for (std::size_t i = axes_.size(); i-- > 0; rank /= axes_[i].size) c[i] = rank % axes_[i].size;
  return c;
}

int MeshLayout::coordinate(int rank, std::string_view axis) const {
  if (rank < 0 || rank >= world_)
    fail(Fault::programming, where, fmt::format("rank {}: expected 0 to {}", rank, world_ - 1));
  const std::size_t i = index_of(axes_, axis);
  return i < axes_.size() ? rank / stride(axes_, i) % axes_[i].size : 0;
}

int MeshLayout::rank_at(std::span<const int> coordinate) const {
  if (coordinate.size() != axes_.size())
    fail(Fault::programming, where,
         fmt::format("{} coordinates: expected {}, one for each axis", coordinate.size(), axes_.size()));
  int rank = 0;
  for (std::size_t i = 0; i < axes_.size(); ++i) {
    if (coordinate[i] < 0 || coordinate[i] >= axes_[i].size)
      fail(Fault::programming, where,
           fmt::format("coordinate {} along {}: expected 0 to {}", coordinate[i], axes_[i].name, axes_[i].size - 1));
    rank = rank * axes_[i].size + coordinate[i];
  }
  return rank;
}

std::vector<int> MeshLayout::group(int rank, std::span<const std::string_view> axes) const {
  if (rank < 0 || rank >= world_)
    fail(Fault::programming, where, fmt::format("rank {}: expected 0 to {}", rank, world_ - 1));
  int first = rank;
  std::vector<int> members{0};
  for (std::size_t i = 0; i < axes_.size(); ++i) {
    if (std::find(axes.begin(), axes.end(), axes_[i].name) == axes.end()) continue;
    const int step = stride(axes_, i);
    first -= rank / step % axes_[i].size * step;
    std::vector<int> more;
    more.reserve(members.size() * static_cast<std::size_t>(axes_[i].size));
    for (const int m : members)
      for (int c = 0; c < axes_[i].size; ++c) more.push_back(m + c * step);
    members = std::move(more);
  }
  for (int& m : members) m += first;
  return members;
}

std::vector<int> MeshLayout::group(int rank, std::string_view axis) const { return group(rank, std::span(&axis, 1)); }

std::vector<std::vector<int>> MeshLayout::groups(std::span<const std::string_view> axes) const {
  std::vector<std::vector<int>> all;
  std::vector<bool> seen(static_cast<std::size_t>(world_), false);
  for (int rank = 0; rank < world_; ++rank) {
    if (seen[static_cast<std::size_t>(rank)]) continue;
    all.push_back(group(rank, axes));
    for (const int member : all.back()) seen[static_cast<std::size_t>(member)] = true;
  }
  return all;
}

MeshLayout MeshLayout::slice(std::span<const std::string_view> axes) const {
  MeshLayout layout;
  for (const std::size_t i : in_order(axes_, axes, "slice")) layout.axes_.push_back(axes_[i]);
  layout.world_ = product(layout.axes_);
  return layout;
}

MeshLayout MeshLayout::flatten(std::span<const std::string_view> axes, std::string name) const {
  const std::vector<std::size_t> indices = in_order(axes_, axes, "flatten");
  const std::size_t first = indices.front(), last = indices.back();
  if (last - first + 1 != indices.size()) {
    for (std::size_t k = 1; k < indices.size(); ++k)
      if (indices[k] != indices[k - 1] + 1)
        fail(Fault::input, where,
             fmt::format("flatten: '{}' and '{}' are not neighbours; '{}' lies between them", axes_[indices[k - 1]].name,
                         axes_[indices[k]].name, axes_[indices[k - 1] + 1].name));
  }
  std::vector<MeshAxis> fresh(axes_.begin(), axes_.begin() + static_cast<std::ptrdiff_t>(first));
  const std::vector<MeshAxis> taken(axes_.begin() + static_cast<std::ptrdiff_t>(first),
                                    axes_.begin() + static_cast<std::ptrdiff_t>(last) + 1);
  fresh.push_back({std::move(name), product(taken)});
  fresh.insert(fresh.end(), axes_.begin() + static_cast<std::ptrdiff_t>(last) + 1, axes_.end());
  return make(std::move(fresh), world_);
}

MeshLayout MeshLayout::unflatten(std::string_view axis, std::vector<MeshAxis> into) const {
  const std::size_t at = known(axes_, axis);
  if (into.empty()) fail(Fault::input, where, fmt::format("unflatten '{}' into no axes: expected one axis or more", axis));
  if (const auto fault = check(into, axes_[at].size))
    fail(Fault::input, where, fmt::format("unflatten '{}' of {} ranks: {}", axis, axes_[at].size, fault->message));
  const MeshLayout inner = make(std::move(into), axes_[at].size);
  std::vector<MeshAxis> fresh = axes_;
  fresh.erase(fresh.begin() + static_cast<std::ptrdiff_t>(at));
  fresh.insert(fresh.begin() + static_cast<std::ptrdiff_t>(at), inner.axes_.begin(), inner.axes_.end());
  return make(std::move(fresh), world_);
}

MeshLayout MeshLayout::expert_view(int expert) const {
  constexpr std::string_view order[] = {"pp", "replicate", "shard", "context", "tensor"};
  std::size_t from = 0;
  for (const MeshAxis& a : axes_) {
    const auto at = std::find(std::begin(order) + from, std::end(order), a.name);
    if (at == std::end(order))
      fail(Fault::input, where,
           fmt::format("the expert view of {}: expected the axes {}, in this order", describe(), fmt::join(order, ", ")));
    from = static_cast<std::size_t>(at - std::begin(order)) + 1;
  }
  const int inner = size("shard") * size("context") * size("tensor");
  const std::vector<MeshAxis> view{{"expert_shard", -1}, {"expert", expert}};
  if (const auto fault = check(view, inner))
    fail(Fault::input, where,
         fmt::format("expert {}: it must divide shard {} x context {} x tensor {} = {} ranks; {}", expert, size("shard"),
                     size("context"), size("tensor"), inner, fault->message));
  return make({{"pp", size("pp")}, {"replicate", size("replicate")}, {"expert_shard", -1}, {"expert", expert}}, world_);
}

std::uint64_t MeshLayout::digest() const {
  std::string text = fmt::format("{}", world_);
  for (const MeshAxis& a : axes_) text += fmt::format(";{}={}", a.name, a.size);
  return XXH3_64bits(text.data(), text.size());
}

std::string MeshLayout::describe() const {
  if (world_ == 1) return "1 rank";
  std::string text;
  for (const MeshAxis& a : axes_)
    if (a.size > 1) text += fmt::format("{}{} {}", text.empty() ? "" : " x ", a.name, a.size);
  return fmt::format("{} ({} ranks)", text, world_);
}

}  // namespace capstan
