// Boxes: intersection, tiling and the copy between boxes, against element-by-element arithmetic.
#include "checkpoint/boxes.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace capstan::checkpoint {
namespace {

// The element of a global tensor at a multi-index, as its row-major number.
std::int64_t number(const Shape& shape, const Shape& index) {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < shape.size(); ++i) n = n * shape[i] + index[i];
  return n;
}

template <class Visit>
void each(const Box& box, const Visit& visit) {
  const auto total = *volume(box.extent);
  for (std::int64_t n = 0; n < total; ++n) {
    Shape index(box.begin.size());
    auto rest = n;
    for (std::size_t i = box.begin.size(); i-- > 0;) index[i] = box.begin[i] + rest % box.extent[i], rest /= box.extent[i];
    visit(n, index);
  }
}

Box random_box(std::mt19937& random, const Shape& shape) {
  Box box{Shape(shape.size()), Shape(shape.size())};
  for (std::size_t i = 0; i < shape.size(); ++i) {
    box.begin[i] = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape[i]));
    box.extent[i] = 1 + static_cast<std::int64_t>(random() % static_cast<unsigned>(shape[i] - box.begin[i]));
  }
  return box;
}

TEST(Boxes, VolumeRefusesWhatDoesNotFit) {
  EXPECT_EQ(volume(Shape{}), 1);
  EXPECT_EQ(volume(Shape{3, 0, 7}), 0);
  EXPECT_EQ(volume(Shape{3, 5}), 15);
  EXPECT_FALSE(volume(Shape{3, -1}));
  EXPECT_FALSE(volume(Shape{std::int64_t{1} << 40, std::int64_t{1} << 40}));
}

TEST(Boxes, CopiesExactlyTheCommonElements) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 400; ++trial) {
    Shape shape(random() % 5);
    for (auto& extent : shape) extent = 1 + static_cast<std::int64_t>(random() % 6);
    const auto a = random_box(random, shape), b = random_box(random, shape);
    std::vector<std::int32_t> source(static_cast<std::size_t>(*volume(a.extent)));
    each(a, [&](auto n, const auto& index) {
      source[static_cast<std::size_t>(n)] = static_cast<std::int32_t>(number(shape, index));
    });
    std::vector<std::int32_t> target(static_cast<std::size_t>(*volume(b.extent)), -1);
    copy_common(a, source.data(), b, target.data(), sizeof(std::int32_t));
    each(b, [&](auto n, const auto& index) {
      const bool common =
          inside({index, Shape(shape.size(), 1)}, shape) && intersect(a, {index, Shape(shape.size(), 1)}).has_value();
      ASSERT_EQ(target[static_cast<std::size_t>(n)], common ? number(shape, index) : -1)
          << "from " << text_of(a) << " to " << text_of(b) << " in " << text_of(shape);
    });
  }
}

TEST(Boxes, TilingSeesHolesAndOverlaps) {
  const Shape shape{4, 6};
  const std::vector<Box> good = {{{0, 0}, {2, 6}}, {{2, 0}, {2, 3}}, {{2, 3}, {2, 3}}};
  EXPECT_EQ(tiling_fault(shape, good), "");
  EXPECT_NE(tiling_fault(shape, std::vector<Box>{good[0], good[1]}).find("uncovered"), std::string::npos);
  // Equal volume, yet one overlap and one hole.
  EXPECT_NE(tiling_fault(shape, std::vector<Box>{good[0], good[1], {{2, 2}, {2, 3}}}).find("overlap"), std::string::npos);
  EXPECT_NE(tiling_fault(shape, std::vector<Box>{good[0], good[1], {{2, 4}, {2, 3}}}).find("not inside"), std::string::npos);
  EXPECT_EQ(tiling_fault({}, std::vector<Box>{{{}, {}}}), "");
  EXPECT_NE(tiling_fault({}, std::vector<Box>{{{}, {}}, {{}, {}}}), "");
}

}  // namespace
}  // namespace capstan::checkpoint
