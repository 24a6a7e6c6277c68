// place_tensor(): every element on a rank, cuts by unit, queries with their keys; and initial values of placed pieces.
#include "mesh/placement.h"

#include <capstan/device.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

namespace capstan {
namespace {

ParameterSpec spec_of(std::vector<std::vector<Segment>> dims, Role role = Role::matrix) {
  ParameterSpec s;
  s.dims = std::move(dims);
  s.role = role;
  s.init = {Init::Kind::normal, 0.5};
  return s;
}

ParameterSpec qkv(std::int64_t heads, std::int64_t kv, std::int64_t size, std::int64_t hidden) {
  return spec_of(
      {{{"heads", heads, size, "q"}, {"kv_heads", kv, size, "k"}, {"kv_heads", kv, size, "v"}}, {{"hidden", hidden}}});
}

ParameterSpec out(std::int64_t heads, std::int64_t kv, std::int64_t size, std::int64_t hidden) {
  return spec_of({{{"hidden", hidden}}, {{"heads", heads, size, "", kv}}});
}

std::vector<Dims> all_local(const Parameter& p, int size) {
  std::vector<Dims> shapes;
  for (int r = 0; r < size; ++r) shapes.push_back(place_tensor(p, size, r).local);
  return shapes;
}

/// Every index of the cut dimension is held by as many ranks as its run says, and owned by one.
void check_cover(const Parameter& p, int size) {
  std::map<std::int64_t, int> held, owned, expected;
  std::int64_t extent = 0;
  for (int r = 0; r < size; ++r) {
    const TensorPlacement t = place_tensor(p, size, r);
    extent = p.shape()[t.cut() ? t.dim : 0];
    Dims local = p.shape();
    if (t.cut()) local[t.dim] = 0;
    for (const Run& run : t.runs) {
      ASSERT_GE(run.length, 0);
      ASSERT_LE(run.begin + run.length, extent);
      ASSERT_EQ(size % run.ways, 0) << p.name();
      for (std::int64_t i = run.begin; i < run.begin + run.length; ++i)
        ++held[i], owned[i] += t.owns(run), expected[i] = size / run.ways;
      if (t.cut()) local[t.dim] += run.length;
    }
    EXPECT_EQ(t.local, local);
  }
  for (std::int64_t i = 0; i < extent; ++i) {
    EXPECT_EQ(held[i], expected[i]) << p.name() << " element " << i << " of " << size;
    EXPECT_EQ(owned[i], 1) << p.name() << " element " << i << " of " << size;
  }
}

TEST(Placement, EveryElementIsHeldAndOwnedOnce) {
  for (const int size : {1, 2, 3, 4, 6, 8})
    for (const auto& [heads, kv] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {1, 1}, {3, 1}, {4, 2}, {6, 3}, {8, 8}, {12, 4}, {24, 8}, {20, 10}}) {
      check_cover(Parameter("qkv", qkv(heads, kv, 4, 8)), size);
      check_cover(Parameter("out", out(heads, kv, 4, 8)), size);
    }
  for (const int size : {1, 2, 3, 4, 5, 8})
    for (const std::int64_t n : {1, 2, 3, 7, 12, 64, 101}) {
      check_cover(Parameter("table", spec_of({{{"vocab", n}}, {{"hidden", 4}}})), size);
      check_cover(Parameter("gate_up", spec_of({{{"mlp", n, 1, "gate"}, {"mlp", n, 1, "up"}}, {{"hidden", 4}}})), size);
      check_cover(Parameter("norm", spec_of({{{"hidden", n}}}, Role::vector)), size);
    }
}

TEST(Placement, FusedSegmentsAreCutApart) {
  const Parameter p("qkv", qkv(4, 2, 3, 8));
  const TensorPlacement t = place_tensor(p, 4, 3);
  ASSERT_EQ(t.runs.size(), 3u);
  EXPECT_EQ(t.dim, 0);
  EXPECT_EQ(t.runs[0].begin, 9);
  EXPECT_EQ(t.runs[0].length, 3);
  EXPECT_EQ(t.runs[0].ways, 4);
  EXPECT_EQ(t.runs[1].begin, 15);
  EXPECT_EQ(t.runs[1].length, 3);
  EXPECT_EQ(t.runs[1].ways, 2);
  EXPECT_EQ(t.runs[2].begin, 21);
  EXPECT_EQ(t.runs[2].length, 3);
  EXPECT_EQ(t.runs[2].ways, 2);
  EXPECT_EQ(t.local, (Dims{9, 8}));
  EXPECT_EQ(t.extent(p, "q"), 3);
  EXPECT_EQ(t.extent(p, "k"), 3);
  EXPECT_EQ(t.extent(p, "gate"), 0);
  EXPECT_TRUE(t.owns(t.runs[0]));
  EXPECT_FALSE(t.owns(t.runs[1]));
  EXPECT_EQ(place_tensor(p, 1, 0).extent(p, "k"), 6);
}

TEST(Placement, RanksHoldTheKeysOfTheirQueries) {
  for (const int size : {2, 3, 4, 5, 6, 8, 12, 24})
    for (std::int64_t kv = 1; kv <= 12; ++kv)
      for (std::int64_t group = 1; group <= 6; ++group) {
        const std::int64_t heads = kv * group;
        const Parameter p("qkv", qkv(heads, kv, 1, 8)), o("out", out(heads, kv, 1, 8));
        for (int r = 0; r < size; ++r) {
          const TensorPlacement t = place_tensor(p, size, r), to = place_tensor(o, size, r);
          // The projection back reads exactly the heads that are there.
          ASSERT_EQ(to.runs[0].begin, t.runs[0].begin) << heads << "/" << kv << " on " << size;
          ASSERT_EQ(to.runs[0].length, t.runs[0].length) << heads << "/" << kv << " on " << size;
          ASSERT_EQ(t.runs[1].length, t.runs[2].length);
          const std::int64_t q0 = t.runs[0].begin, queries = t.runs[0].length, k0 = t.runs[1].begin - heads,
                             keys = t.runs[1].length;
          ASSERT_EQ(queries % keys, 0);
          for (std::int64_t h = 0; h < queries; ++h)  // ops::attention: head h reads key/value head h / (heads / kv_heads)
            ASSERT_EQ(k0 + h / (queries / keys), (q0 + h) / group) << heads << "/" << kv << " on " << size << ", rank " << r;
        }
      }
}

TEST(Placement, OddCountsAreComputedByAllAndAVocabularyIsCutUnevenly) {
  const Parameter three("out", out(3, 3, 4, 8));
  const TensorPlacement t = place_tensor(three, 2, 1);
  EXPECT_TRUE(t.cut());  // its layer gathers rows, and knows that it repeats
  EXPECT_EQ(t.local, (Dims{8, 12}));
  EXPECT_EQ(t.runs[0].ways, 1);
  EXPECT_FALSE(t.owns(t.runs[0]));
  const Parameter table("table", spec_of({{{"vocab", 5}}, {{"hidden", 4}}}, Role::embedding));
  EXPECT_EQ(all_local(table, 4), (std::vector<Dims>{{2, 4}, {2, 4}, {1, 4}, {0, 4}}));
  const Parameter bias("bias", spec_of({{{"mlp", 6}}}, Role::bias));
  EXPECT_EQ(all_local(bias, 4), (std::vector<Dims>{{3}, {3}, {3}, {3}}));
  const Parameter norm("norm", spec_of({{{"hidden", 6}}}, Role::vector));
  EXPECT_FALSE(place_tensor(norm, 4, 2).cut());
}

TEST(Placement, RefusesTwoCutDimensions) {
  const Parameter p("mixed", spec_of({{{"mlp", 4}}, {{"heads", 4}}}));
  try {
    place_tensor(p, 2, 0);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("dimensions 0 and 1 both lie on axes"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(place_tensor(p, 1, 0).cut());
  EXPECT_THROW(place_tensor(p, 2, 2), Error);
}

/// The whole parameter's initial values, cut by hand.
template <class T>
std::vector<T> cut_by_hand(const Parameter& p, const TensorPlacement& t, const std::vector<T>& whole) {
  const Dims shape = p.shape();
  const int dim = t.cut() ? t.dim : 0;
  std::int64_t inner = 1, outer = 1;
  for (int d = 0; d < dim; ++d) outer *= shape[d];
  for (int d = dim + 1; d < shape.size(); ++d) inner *= shape[d];
  std::vector<T> piece;
  for (std::int64_t o = 0; o < outer; ++o)
    for (const Run& run : t.runs)
      for (std::int64_t i = 0; i < run.length * inner; ++i)
        piece.push_back(whole[static_cast<std::size_t>((o * shape[dim] + run.begin) * inner + i)]);
  return piece;
}

template <class T>
void check_initial_values(DType dtype) {
  const auto device = make_cpu_device(2);
  const std::vector<std::pair<std::string, ParameterSpec>> all{
      {"qkv", qkv(6, 3, 5, 7)},
      {"out", out(6, 3, 5, 7)},
      {"table", spec_of({{{"vocab", 101}}, {{"hidden", 9}}})},
      {"gate_up", spec_of({{{"mlp", 12, 1, "gate"}, {"mlp", 12, 1, "up"}}, {{"hidden", 5}}})},
      {"down", spec_of({{{"hidden", 5}}, {{"mlp", 12}}})},
      {"cube", spec_of({{{"hidden", 3, 1, "a"}, {"hidden", 2, 1, "b"}}, {{"mlp", 4}}, {{"x", 3}}})},
      {"norm", spec_of({{{"hidden", 33}}})},
  };
  for (const auto& [name, spec] : all)
    for (const int size : {1, 2, 3, 4})
      for (int rank = 0; rank < size; ++rank) {
        Parameter p("block." + name, spec);
        const Tensor whole = Tensor::zeros(p.shape(), dtype, *device);
        p.initialize(7, whole);
        const auto t = std::make_shared<TensorPlacement>(place_tensor(p, size, rank));
        const std::vector<T> values(whole.data<T>(), whole.data<T>() + whole.numel()), want = cut_by_hand(p, *t, values);
        ASSERT_EQ(static_cast<std::int64_t>(want.size()), t->local.product());
        p.set_placement(t);
        const auto n = static_cast<std::int64_t>(want.size());
        for (const std::int64_t step : {n, std::int64_t{1}, std::int64_t{7}, n / 3 + 1}) {
          std::vector<T> got;
          for (std::int64_t at = 0; at < n; at += step) {
            const Tensor piece = Tensor::full(Dims{std::min(step, n - at)}, -1, dtype, *device);
            p.initialize_flat(7, piece, at);
            got.insert(got.end(), piece.data<T>(), piece.data<T>() + piece.numel());
          }
          ASSERT_EQ(std::memcmp(got.data(), want.data(), want.size() * sizeof(T)), 0)
              << name << " over " << size << ", rank " << rank << ", pieces of " << step;
        }
      }
}

TEST(Placement, InitialValuesOfAPieceAreThoseOfTheWhole) {
  check_initial_values<float>(DType::f32);
  check_initial_values<double>(DType::f64);
  check_initial_values<bf16>(DType::bf16);
}

TEST(Placement, InitialValuesAreAddressedByTheUnfusedElement) {
  // The fused weight has the bits of the parts that a model with separate projections would have under the same names.
  const auto device = make_cpu_device(1);
  Parameter fused("w", spec_of({{{"mlp", 6, 1, "gate"}, {"mlp", 6, 1, "up"}}, {{"hidden", 5}}})),
      up("w/up", spec_of({{{"mlp", 6}}, {{"hidden", 5}}}));
  const auto t = std::make_shared<TensorPlacement>(place_tensor(fused, 2, 1));
  fused.set_placement(t);
  const Tensor local = Tensor::zeros(Dims{t->local.product()}, DType::f32, *device),
               whole = Tensor::zeros(up.shape(), DType::f32, *device);
  fused.initialize_flat(3, local, 0);
  up.initialize(3, whole);
  for (std::int64_t i = 0; i < 15; ++i) EXPECT_EQ(local.data<float>()[15 + i], whole.data<float>()[15 + i]);
}

TEST(Placement, InitialValuesRefuseWhatIsNotThere) {
  const auto device = make_cpu_device(1);
  Parameter p("w", spec_of({{{"mlp", 6}}, {{"hidden", 5}}}));
  p.set_placement(std::make_shared<TensorPlacement>(place_tensor(p, 2, 0)));
  EXPECT_THROW(p.initialize_flat(1, Tensor::zeros(Dims{4}, DType::f32, *device), 12), Error);
  EXPECT_THROW(p.initialize(1, Tensor::zeros(Dims{6, 5}, DType::f32, *device)), Error);
  EXPECT_THROW(p.initialize_flat(1, Tensor::zeros(Dims{4}, DType::i32, *device), 0), Error);
  const Tensor none = Tensor::zeros(Dims{0}, DType::f32, *device);
  EXPECT_NO_THROW(p.initialize_flat(1, none, 15));
}

}  // namespace
}  // namespace capstan
