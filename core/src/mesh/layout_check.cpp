// MeshLayout::check: what is wrong with axes over a number of ranks, and the valid meshes nearest to them.
#include "mesh/layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

namespace capstan {
namespace {

constexpr std::size_t most_fixes = 3;

std::vector<int> divisors(int n) {
  std::vector<int> low, high;
  for (int d = 1; static_cast<std::int64_t>(d) * d <= n; ++d) {
    if (n % d != 0) continue;
    low.push_back(d);
    if (d != n / d) high.push_back(n / d);
  }
  low.insert(low.end(), high.rbegin(), high.rend());
  return low;
}

/// "2^3 x 3"
std::string factors(int n) {
  std::string text;
  const auto add = [&](int prime, int power) {
    text += fmt::format("{}{}", text.empty() ? "" : " x ", prime);
    if (power > 1) text += fmt::format("^{}", power);
  };
  for (int p = 2; static_cast<std::int64_t>(p) * p <= n; ++p) {
    int power = 0;
    for (; n % p == 0; n /= p) ++power;
    if (power > 0) add(p, power);
  }
  if (n > 1 || text.empty()) add(n, 1);
  return text;
}

/// The divisors of `n` on both sides of `wanted`: the greatest that is not above it and the least that is not below.
std::vector<int> nearest_divisors(int n, int wanted) {
  const std::vector<int> all = divisors(n);
  const auto above = std::lower_bound(all.begin(), all.end(), wanted);
  std::vector<int> near;
  if (above != all.begin() && (above == all.end() || *above != wanted)) near.push_back(*(above - 1));
  if (above != all.end()) near.push_back(*above);
  return near;
}

/// How far a mesh is from the one asked for; a size that is no size counts as 1, the axis that takes what is left as
/// nothing. To put an axis to use that was not is further than to change one that was.
double distance(const std::vector<MeshAxis>& asked, const std::vector<MeshAxis>& fix) {
  double sum = 0;
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (asked[i].size == -1) continue;
    sum += std::abs(std::log(static_cast<double>(fix[i].size) / std::max(1, asked[i].size)));
    if (asked[i].size == 1 && fix[i].size > 1) sum += 1;
  }
  return sum;
}

/// "8 ranks (2^3)", "7 ranks (a prime)", "1 rank"
std::string rank_words(int world) {
  if (world == 1) return "1 rank";
  const std::string parts = factors(world);
  return fmt::format("{} ranks ({})", world, parts == std::to_string(world) ? "a prime" : parts);
}

/// Meshes over `world` ranks that differ from `asked` in one axis (and in the one that takes what is left), and if there
/// are none, one that differs in several. The nearest first.
std::vector<std::vector<MeshAxis>> fixes_for(const std::vector<MeshAxis>& asked, int world) {
  std::vector<std::vector<MeshAxis>> found;
  const auto rest_at =
      std::find_if(asked.begin(), asked.end(), [](const MeshAxis& a) { return a.size == -1; }) - asked.begin();
  const auto rest = static_cast<std::size_t>(rest_at);
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (asked[i].size == -1) continue;
    std::int64_t others = 1;
    bool good = true;
    for (std::size_t k = 0; k < asked.size(); ++k) {
      if (k == i || asked[k].size == -1) continue;
      good = good && asked[k].size >= 1 && (others *= asked[k].size) <= world;
    }
    if (!good || world % others != 0) continue;
    const int left = static_cast<int>(world / others);
    for (const int size :
         rest < asked.size() ? nearest_divisors(left, std::max(1, asked[i].size)) : std::vector<int>{left}) {
      std::vector<MeshAxis> fix = asked;
      fix[i].size = size;
      if (rest < asked.size()) fix[rest].size = left / size;
      found.push_back(std::move(fix));
    }
  }
  if (found.empty()) {
    // Every axis takes the divisor of what the inner ones left that is nearest; one axis takes the remainder.
    std::size_t taker = rest;
    if (taker == asked.size()) {
      for (taker = 0; taker < asked.size() && asked[taker].name != "shard"; ++taker) {
      }
      if (taker == asked.size()) taker = 0;
    }
    std::vector<MeshAxis> fix = asked;
    int left = world;
    for (std::size_t i = asked.size(); i-- > 0;) {
      if (i == taker) continue;
      const int wanted = std::max(1, asked[i].size);
      const std::vector<int> near = nearest_divisors(left, wanted);
      fix[i].size = near.size() == 2 && near[1] - wanted < wanted - near[0] ? near[1] : near[0];
      left /= fix[i].size;
    }
    fix[taker].size = left;
    found.push_back(std::move(fix));
  }
  std::stable_sort(found.begin(), found.end(),
                   [&](const auto& a, const auto& b) { return distance(asked, a) < distance(asked, b); });
  found.erase(std::unique(found.begin(), found.end()), found.end());
  if (found.size() > most_fixes) found.resize(most_fixes);
  return found;
}

/// "pp 2 x shard 3"; sizes of 1 left out.
std::string words(const std::vector<MeshAxis>& axes) {
  std::string text;
  for (const MeshAxis& a : axes)
    if (a.size != 1)
      text += fmt::format("{}{} {}", text.empty() ? "" : " x ", a.name, a.size == -1 ? "auto" : std::to_string(a.size));
  return text.empty() ? "all axes of 1" : text;
}

/// "8 ranks make pp 2 x shard 4, or ..."
std::string fix_words(const std::vector<std::vector<MeshAxis>>& fixes, int world) {
  if (world == 1) return "1 rank has no axis above 1";
  std::string text;
  for (const auto& fix : fixes) text += fmt::format("{}{}", text.empty() ? "" : ", or ", words(fix));
  return fmt::format("{} ranks make {}", world, text);
}

/// The first axis in which a fix differs from what was asked.
std::string changed_axis(const std::vector<MeshAxis>& asked, const std::vector<MeshAxis>& fix) {
  for (std::size_t i = 0; i < asked.size(); ++i)
    if (asked[i].size != -1 && asked[i].size != fix[i].size) return asked[i].name;
  return "";
}

bool is_name(const std::string& name) {
  const auto part = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; };
  return !name.empty() && std::all_of(name.begin(), name.end(), part);
}

}  // namespace

std::optional<MeshFault> MeshLayout::check(const std::vector<MeshAxis>& axes, int world) {
  if (world < 1) return MeshFault{"", fmt::format("a job of {} ranks: expected 1 or more", world), {}};
  std::string rest;
  std::int64_t product = 1;
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const MeshAxis& a = axes[i];
    if (!is_name(a.name))
      return MeshFault{a.name, fmt::format("axis name '{}': expected lower-case letters, digits and _", a.name), {}};
    for (std::size_t k = 0; k < i; ++k)
      if (axes[k].name == a.name)
        return MeshFault{a.name, fmt::format("axis '{}' is there twice: expected each name once", a.name), {}};
  }
  for (const MeshAxis& a : axes) {
    if (a.size == -1 && !rest.empty())
      return MeshFault{
          a.name,
          fmt::format("both {} and {} are to take the ranks that are left: expected one such axis at most", rest, a.name),
          {}};
    if (a.size == -1) rest = a.name;
  }
  for (const MeshAxis& a : axes) {
    if (a.size < 1 && a.size != -1) {
      MeshFault fault{a.name, "", fixes_for(axes, world)};
      fault.message = fmt::format("{} ranks along {}: expected 1 or more, or -1 for what the other axes leave; {}", a.size,
                                  a.name, fix_words(fault.fixes, world));
      return fault;
    }
    if (a.size > 0)
      product = std::min<std::int64_t>(product * a.size, std::int64_t{1} << 40);  // no need to know more than: too many
  }
  if (rest.empty() ? product == world : world % product == 0) return std::nullopt;
  if (axes.empty()) return MeshFault{"", fmt::format("a mesh without axes has 1 rank, but the job has {}", world), {}};

  MeshFault fault{"", "", fixes_for(axes, world)};
  fault.axis = changed_axis(axes, fault.fixes.front());
  std::vector<MeshAxis> given;
  for (const MeshAxis& a : axes)
    if (a.size > 0) given.push_back(a);
  const std::string many = product >= (std::int64_t{1} << 40) ? "far more" : std::to_string(product);
  fault.message = rest.empty() ? fmt::format("{} makes {} {}, but the job has {}", words(given), many,
                                             product == 1 ? "rank" : "ranks", rank_words(world))
                               : fmt::format("{} ({} ranks) does not divide the job's {}, so {} cannot take what is left",
                                             words(given), many, rank_words(world), rest);
  fault.message += "; " + fix_words(fault.fixes, world);
  if (product > 1 && product < (1 << 30)) {
    const std::int64_t below = world / product * product, above = below + product;
    if (rest.empty())
      fault.message += fmt::format("; or start {} ranks", product);
    else
      fault.message +=
          below > 0 ? fmt::format("; or start {} or {} ranks", below, above) : fmt::format("; or start {} ranks", above);
  }
  return fault;
}

}  // namespace capstan
