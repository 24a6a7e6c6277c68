// Where a rank's piece of a parameter lies in the global tensor, and the memory that units take turns in.
#include "engine/boxes.h"
#include "engine/pool.h"

#include <capstan/parameter.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <vector>

namespace capstan {
namespace {

std::vector<std::int64_t> coordinates(std::int64_t flat, const Dims& shape) {
  std::vector<std::int64_t> at(static_cast<std::size_t>(shape.size()));
  for (int d = shape.size() - 1; d >= 0; --d) at[static_cast<std::size_t>(d)] = flat % shape[d], flat /= shape[d];
  return at;
}

/// Gives every element of the global tensor to the boxes of all tensor ranks and pieces; how often each was written.
std::vector<int> writers(const Parameter& p, int tensor, int pieces, bool owned_only) {
  const Dims whole = p.shape();
  std::vector<int> count(static_cast<std::size_t>(whole.product()), 0);
  for (int t = 0; t < tensor; ++t) {
    const TensorPlacement placement = place_tensor(p, tensor, t);
    const std::int64_t n = placement.local.product();
    // The global element behind each local one, by the placement's own words.
    std::vector<std::int64_t> along;
    for (const Run& r : placement.runs)
      for (std::int64_t i = 0; i < r.length; ++i) along.push_back(r.begin + i);
    const int d = std::max(placement.dim, 0);
    for (int piece = 0; piece < pieces; ++piece) {
      const std::int64_t begin = n * piece / pieces, end = n * (piece + 1) / pieces;
      std::int64_t covered = 0;
      for (const LocalBox& box : boxes_of(placement.local, &placement, begin, end)) {
        Dims extent{std::span<const std::int64_t>(box.extent)};
        EXPECT_GE(box.at, begin);
        EXPECT_LE(box.at + extent.product(), end);
        covered += extent.product();
        for (std::int64_t i = 0; i < extent.product(); ++i) {
          auto local = coordinates(box.at + i, placement.local);  // consecutive in memory
          auto inside = coordinates(i, extent);
          std::int64_t flat = 0;
          for (int k = 0; k < whole.size(); ++k) {
            const auto K = static_cast<std::size_t>(k);
            const std::int64_t global = box.begin[K] + inside[K];
            EXPECT_EQ(global, k == d ? along[static_cast<std::size_t>(local[K])] : local[K]);
            flat = flat * whole[k] + global;
          }
          if (box.owned || !owned_only) ++count[static_cast<std::size_t>(flat)];
        }
      }
      EXPECT_EQ(covered, end - begin);
    }
  }
  return count;
}

Parameter make(std::vector<std::vector<Segment>> dims) {
  ParameterSpec spec;
  spec.dims = std::move(dims);
  return Parameter("p", std::move(spec));
}

TEST(Boxes, OfAllRanksWriteEachElementOnce) {
  const std::vector<std::vector<std::vector<Segment>>> shapes{
      {{{"heads", 6, 3, "q"}, {"kv_heads", 3, 3, "k"}, {"kv_heads", 3, 3, "v"}}, {{"hidden", 5, 1, ""}}},
      {{{"heads", 8, 2, "q"}, {"kv_heads", 2, 2, "k"}, {"kv_heads", 2, 2, "v"}}, {{"hidden", 7, 1, ""}}},
      {{{"hidden", 5, 1, ""}}, {{"heads", 8, 2, ""}}},
      {{{"mlp", 9, 1, "gate"}, {"mlp", 9, 1, "up"}}, {{"hidden", 4, 1, ""}}},
      {{{"hidden", 4, 1, ""}}, {{"mlp", 6, 1, "gate"}, {"mlp", 6, 1, "up"}}},  // two runs of a later dimension
      {{{"vocab", 13, 1, ""}}, {{"hidden", 3, 1, ""}}},
      {{{"hidden", 11, 1, ""}}},
      {{{"experts", 3, 1, ""}}, {{"mlp", 4, 1, ""}}, {{"hidden", 5, 1, ""}}}};
  for (const auto& dims : shapes) {
    const Parameter p = make(dims);
    for (const int tensor : {1, 2, 3, 4})
      for (const int pieces : {1, 2, 3, 5, 8}) {
        SCOPED_TRACE(to_string(p.shape()) + " over " + std::to_string(tensor) + " tensor ranks, " + std::to_string(pieces) + " pieces");
        const std::vector<int> once = writers(p, tensor, pieces, true);
        EXPECT_TRUE(std::all_of(once.begin(), once.end(), [](int n) { return n == 1; }));
        const std::vector<int> held = writers(p, tensor, pieces, false);
        EXPECT_TRUE(std::all_of(held.begin(), held.end(), [](int n) { return n >= 1; }));
      }
  }
}

TEST(Boxes, OfAMatrixAreAtMostThree) {
  const Dims shape{7, 5};
  for (std::int64_t begin = 0; begin <= 35; ++begin)
    for (std::int64_t end = begin; end <= 35; ++end) {
      const auto boxes = boxes_of(shape, nullptr, begin, end);
      EXPECT_LE(boxes.size(), 3u);
      std::int64_t n = 0;
      for (const LocalBox& b : boxes) {
        EXPECT_EQ(b.at, begin + n);
        n += b.extent[0] * b.extent[1];
      }
      EXPECT_EQ(n, end - begin);
    }
}

TEST(Pool, HandsOutWhatIsFreeAndNothingTwice) {
  const auto device = make_cpu_device(1);
  Pool pool(*device, 1000);
  const auto a = pool.take(400), b = pool.take(400);
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(pool.take(400));
  const auto c = pool.take(200);
  ASSERT_TRUE(c);
  EXPECT_EQ(std::set<std::int64_t>({*a, *b, *c}), std::set<std::int64_t>({0, 400, 800}));
  pool.give(*b);
  EXPECT_FALSE(pool.take(401));
  EXPECT_EQ(pool.take(400), b);
  pool.give(*a);
  EXPECT_THROW(pool.give(*a), Error);
  EXPECT_EQ(device->bytes_held(), 1024) << "memory is taken once, when the pool is made";
}

}  // namespace
}  // namespace capstan
