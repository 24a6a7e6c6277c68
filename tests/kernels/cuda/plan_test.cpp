// How kernels are laid out on a GPU: plain arithmetic, checked without one.
#include <kernels/cuda/plan.h>
#include <kernels/pool.h>

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <vector>

namespace capstan::kernels::cuda {
namespace {

Strided strided(std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> to, std::initializer_list<std::int64_t> from) {
  Strided s;
  for (const std::int64_t n : shape) s.shape[s.rank++] = n;
  int i = 0;
  for (const std::int64_t n : to) s.to[i++] = n;
  i = 0;
  for (const std::int64_t n : from) s.from[i++] = n;
  return s;
}

/// Byte places of all of a walk, in order: (to, from).
std::vector<std::pair<std::int64_t, std::int64_t>> places(const Strided& s, std::int64_t unit, std::int64_t bytes) {
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (std::int64_t i = 0; i < elements(s); ++i) {
    std::int64_t left = i, a = 0, b = 0;
    for (int d = s.rank - 1; d >= 0; --d) a += left % s.shape[d] * s.to[d], b += left % s.shape[d] * s.from[d], left /= s.shape[d];
    for (std::int64_t k = 0; k < unit; k += bytes) all.emplace_back(a * unit + k, b * unit + k);
  }
  return all;
}

TEST(Plan, MergedWalksVisitTheSamePlaces) {
  for (const Strided& s : {strided({3, 5, 7}, {35, 7, 1}, {35, 7, 1}), strided({3, 5, 7}, {35, 7, 1}, {70, 14, 1}), strided({2, 1, 4}, {4, 4, 1}, {1, 9, 2}),
                           strided({6, 4}, {4, 1}, {1, 6}), strided({1}, {1}, {5}), strided({}, {}, {})})
    EXPECT_EQ(places(merged(s), 4, 4), places(s, 4, 4));
  EXPECT_EQ(merged(strided({3, 5, 7}, {35, 7, 1}, {35, 7, 1})).rank, 1);
}

TEST(Plan, CopiesMoveTheWidestUnitThatFitsAndTheSameBytes) {
  alignas(16) static char memory[64];
  struct Case { Strided s; std::int64_t element, shift, unit; };
  const Case cases[] = {
      {strided({16, 64}, {64, 1}, {192, 1}), 2, 0, 16},  // a column slice of bf16
      {strided({16, 64}, {64, 1}, {192, 1}), 2, 8, 8},   // at an address of 8
      {strided({16, 63}, {63, 1}, {192, 1}), 2, 0, 2},   // odd rows
      {strided({16, 64}, {64, 1}, {190, 1}), 2, 0, 4},   // steps of 4 bytes
      {strided({5, 12}, {12, 1}, {24, 1}), 4, 0, 16},
      {strided({5, 12}, {1, 5}, {24, 1}), 4, 0, 4},      // turned over
      {strided({6}, {1}, {1}), 8, 0, 16},
  };
  for (const Case& c : cases) {
    const CopyPlan plan = copy_plan(c.s, c.element, memory + c.shift, memory);
    EXPECT_EQ(plan.unit, c.unit);
    auto got = places(plan.shape, plan.unit, c.element), want = places(c.s, c.element, c.element);
    EXPECT_EQ(got, want);
  }
}

TEST(Plan, VectorsNeedAlignedAddresses) {
  alignas(16) static char memory[64];
  EXPECT_EQ(vector_width(2, {memory, memory + 16}), 8);
  EXPECT_EQ(vector_width(4, {memory}), 4);
  EXPECT_EQ(vector_width(8, {memory + 32}), 2);
  EXPECT_EQ(vector_width(2, {memory, memory + 2}), 1);
}

TEST(Plan, ReductionsCoverEachElementOnceWithinTheGridsLimits) {
  for (const std::int64_t outer : {std::int64_t{1}, std::int64_t{3}, std::int64_t{8192}})
    for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, std::int64_t{63}, std::int64_t{4097}, std::int64_t{1} << 20, (std::int64_t{1} << 33) + 7})
      for (const std::int64_t inner : {std::int64_t{1}, std::int64_t{17}, std::int64_t{768}, std::int64_t{50257}}) {
        const ReducePlan p = reduce_plan(outer, n, inner);
        EXPECT_GE(p.chunks, 1);
        EXPECT_LE(p.chunks, 256);
        EXPECT_GE(p.chunks * p.length, n) << outer << " " << n << " " << inner;
        if (p.chunks > 1) { EXPECT_LT((p.chunks - 1) * p.length, n); }
      }
  EXPECT_EQ(grid_for(0, 256).blocks, 0);
  EXPECT_EQ(grid_for(257, 256).blocks, 2);
  EXPECT_EQ(grid_for(std::int64_t{1} << 50, 256).blocks, most_blocks_x);
}

TEST(Pool, SplitsJoinsGivesBackAndSaysWhenThereIsNoMore) {
  std::map<char*, std::int64_t> regions;
  std::int64_t limit = 4096;
  const auto take = [&](std::int64_t bytes) -> char* {
    std::int64_t held = bytes;
    for (const auto& [base, size] : regions) held += size;
    if (held > limit) return nullptr;
    char* base = static_cast<char*>(std::aligned_alloc(256, static_cast<std::size_t>(bytes)));
    regions[base] = bytes;
    return base;
  };
  const auto give = [&](char* base, std::int64_t bytes) {
    EXPECT_EQ(regions.at(base), bytes);
    regions.erase(base);
    std::free(base);
  };
  {
    Pool pool(take, give, 256, 2048, 512);
    void *a = pool.take(256), *b = pool.take(512), *c = pool.take(1280);
    EXPECT_EQ(pool.reserved(), 2048);
    EXPECT_EQ(static_cast<char*>(b) - static_cast<char*>(a), 256);
    EXPECT_EQ(pool.largest_free(), 0);
    pool.give(a), pool.give(b);
    EXPECT_EQ(pool.largest_free(), 768);
    EXPECT_EQ(pool.take(768), a);  // joined again
    void* d = pool.take(1024);     // a second region
    EXPECT_EQ(pool.reserved(), 4096);
    EXPECT_EQ(pool.take(2048), nullptr);
    pool.give(d);
    EXPECT_EQ(pool.trim(), 2048);
    EXPECT_EQ(pool.reserved(), 2048);
    EXPECT_EQ(pool.trim(), 0);  // what is in use stays
    EXPECT_NE(pool.take(2048), nullptr);
    pool.give(c);
  }
  EXPECT_TRUE(regions.empty());
}

}  // namespace
}  // namespace capstan::kernels::cuda
