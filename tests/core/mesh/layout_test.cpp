// Layouts: the arithmetic of ranks, axes and groups over many meshes, and what is said about those that do not fit.
#include "mesh/layout.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <functional>
#include <numeric>
#include <set>
#include <string>
#include <vector>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Names = std::vector<std::string_view>;

const std::array<const char*, 5> training{"pp", "replicate", "shard", "context", "tensor"};

MeshLayout train_mesh(int pp, int replicate, int shard, int context, int tensor) {
  return MeshLayout::make({{"pp", pp}, {"replicate", replicate}, {"shard", shard}, {"context", context}, {"tensor", tensor}},
                          pp * replicate * shard * context * tensor);
}

/// Every training mesh over exactly `world` ranks.
std::vector<MeshLayout> all_meshes(int world) {
  std::vector<MeshLayout> all;
  for (int p = 1; p <= world; ++p)
    for (int r = 1; p * r <= world; ++r)
      for (int s = 1; p * r * s <= world; ++s)
        for (int c = 1; p * r * s * c <= world; ++c)
          if (world % (p * r * s * c) == 0) all.push_back(train_mesh(p, r, s, c, world / (p * r * s * c)));
  std::erase_if(all, [&](const MeshLayout& m) { return m.world() != world; });
  return all;
}

std::string refusal(const std::function<void()>& what, Fault expected = Fault::input) {
  try {
    what();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), expected) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "accepted";
  return "";
}

std::string refusal_of(std::vector<MeshAxis> axes, int world) {
  return refusal([&] { MeshLayout::make(axes, world); });
}

TEST(Layout, LastAxisIsTheFastest) {
  const MeshLayout m = train_mesh(1, 1, 2, 1, 4);
  EXPECT_EQ(m.world(), 8);
  EXPECT_THAT(m.group(0, "tensor"), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(m.group(6, "tensor"), ElementsAre(4, 5, 6, 7));
  EXPECT_THAT(m.group(6, "shard"), ElementsAre(2, 6));
  EXPECT_THAT(m.group(6, "pp"), ElementsAre(6));
  EXPECT_THAT(m.coordinate(6), ElementsAre(0, 0, 1, 0, 2));
  EXPECT_EQ(m.describe(), "shard 2 x tensor 4 (8 ranks)");
  EXPECT_EQ(MeshLayout().describe(), "1 rank");
  EXPECT_EQ(MeshLayout().world(), 1);
  EXPECT_THAT(MeshLayout().group(0, "shard"), ElementsAre(0));
}

TEST(Layout, OneAxisTakesWhatIsLeft) {
  const MeshLayout m = MeshLayout::make({{"pp", 2}, {"shard", -1}, {"tensor", 3}}, 24);
  EXPECT_EQ(m.size("shard"), 4);
  EXPECT_EQ(m.size("context"), 1);
  EXPECT_FALSE(m.has("context"));
  EXPECT_EQ(m.describe(), "pp 2 x shard 4 x tensor 3 (24 ranks)");
}

// What follows is true of any mesh: it is asked of each one over 1, 2, 3, 8, 12, 24, 30 and 64 ranks.
class AnyMesh : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Layout, AnyMesh, ::testing::Values(1, 2, 3, 8, 12, 24, 30, 64));

TEST_P(AnyMesh, RanksAndCoordinatesAreOneToOne) {
  const auto meshes = all_meshes(GetParam());
  ASSERT_FALSE(meshes.empty());
  for (const MeshLayout& m : meshes) {
    std::set<std::vector<int>> seen;
    for (int rank = 0; rank < m.world(); ++rank) {
      const std::vector<int> c = m.coordinate(rank);
      EXPECT_EQ(m.rank_at(c), rank);
      EXPECT_TRUE(seen.insert(c).second);
      for (std::size_t i = 0; i < training.size(); ++i) {
        EXPECT_EQ(m.coordinate(rank, training[i]), c[i]);
        EXPECT_LT(c[i], m.size(training[i]));
      }
    }
  }
}

TEST_P(AnyMesh, GroupsOfEverySetOfAxesPartitionTheRanks) {
  for (const MeshLayout& m : all_meshes(GetParam())) {
    for (unsigned set = 0; set < 32; ++set) {
      Names axes;
      int size = 1;
      for (unsigned i = 0; i < 5; ++i)
        if (set >> i & 1) axes.push_back(training[i]), size *= m.size(training[i]);
      const auto groups = m.groups(axes);
      ASSERT_EQ(static_cast<int>(groups.size()) * size, m.world());
      std::vector<int> all;
      for (const auto& group : groups) {
        ASSERT_EQ(static_cast<int>(group.size()), size);
        EXPECT_TRUE(std::is_sorted(group.begin(), group.end()));
        for (const int rank : group) {
          EXPECT_EQ(m.group(rank, axes), group);  // all members see the same group
          for (unsigned i = 0; i < 5; ++i) {
            if (!(set >> i & 1)) {
              EXPECT_EQ(m.coordinate(rank, training[i]), m.coordinate(group.front(), training[i]));
            }
          }
        }
        all.insert(all.end(), group.begin(), group.end());
      }
      std::sort(all.begin(), all.end());
      for (int rank = 0; rank < m.world(); ++rank) ASSERT_EQ(all[static_cast<std::size_t>(rank)], rank);
      // The names' order does not change a group, nor does one that the mesh lacks.
      Names other(axes.rbegin(), axes.rend());
      other.push_back("elsewhere");
      EXPECT_EQ(m.groups(other), groups);
      // A slice is the mesh of such a group.
      if (axes.empty()) continue;
      const MeshLayout slice = m.slice(axes);
      ASSERT_EQ(slice.world(), size);
      for (const auto& group : groups) {
        for (int i = 0; i < size; ++i) {
          for (const auto axis : axes) {
            EXPECT_EQ(slice.coordinate(i, axis), m.coordinate(group[static_cast<std::size_t>(i)], axis));
            std::vector<int> there;
            for (const int k : slice.group(i, axis)) there.push_back(group[static_cast<std::size_t>(k)]);
            EXPECT_EQ(there, m.group(group[static_cast<std::size_t>(i)], axis));
          }
        }
      }
    }
  }
}

TEST_P(AnyMesh, FlattenedAndUnflattenedAxesHaveTheSameRanks) {
  for (const MeshLayout& m : all_meshes(GetParam())) {
    for (std::size_t first = 0; first < 5; ++first) {
      for (std::size_t last = first; last < 5; ++last) {
        const Names axes(training.begin() + static_cast<std::ptrdiff_t>(first),
                         training.begin() + static_cast<std::ptrdiff_t>(last) + 1);
        const MeshLayout flat = m.flatten(axes, "one");
        EXPECT_EQ(flat.axes().size(), 5 - (last - first));
        EXPECT_EQ(flat.groups(Names{"one"}), m.groups(axes));
        std::vector<MeshAxis> back;
        for (const auto axis : axes) back.push_back({std::string(axis), m.size(axis)});
        EXPECT_EQ(flat.unflatten("one", back), m);
        back.front().size = -1;
        EXPECT_EQ(flat.unflatten("one", back), m);
      }
    }
  }
}

TEST_P(AnyMesh, ExpertViewUnflattensTheSameRanks) {
  for (const MeshLayout& m : all_meshes(GetParam())) {
    const int inner = m.size("shard") * m.size("context") * m.size("tensor");
    for (int expert = 1; expert <= inner + 1; ++expert) {
      if (inner % expert != 0) {
        EXPECT_THAT(refusal([&] { m.expert_view(expert); }),
                    AllOf(HasSubstr("expert"), HasSubstr(std::to_string(inner) + " ranks")));
        continue;
      }
      const MeshLayout view = m.expert_view(expert);
      EXPECT_EQ(view.size("expert"), expert);
      EXPECT_EQ(view.size("expert_shard"), inner / expert);
      // Replicas and stages are the same ranks in both views; the expert axes cut the rest.
      EXPECT_EQ(view.groups(Names{"pp"}), m.groups(Names{"pp"}));
      EXPECT_EQ(view.groups(Names{"replicate"}), m.groups(Names{"replicate"}));
      EXPECT_EQ(view.groups(Names{"expert_shard", "expert"}), m.groups(Names{"shard", "context", "tensor"}));
      for (int rank = 0; rank < m.world(); ++rank) {
        const auto experts = view.group(rank, "expert");
        EXPECT_EQ(experts.back() - experts.front(), expert - 1);  // neighbours
      }
    }
  }
}

TEST_P(AnyMesh, DigestsTellMeshesApart) {
  const auto meshes = all_meshes(GetParam());
  std::set<std::uint64_t> digests;
  for (const MeshLayout& m : meshes) {
    digests.insert(m.digest());
    EXPECT_EQ(MeshLayout(m).digest(), m.digest());
  }
  EXPECT_EQ(digests.size(), meshes.size());
}

TEST(Layout, DigestCountsNamesAndOrder) {
  const auto digest = [](std::vector<MeshAxis> axes, int world) {
    return MeshLayout::make(std::move(axes), world).digest();
  };
  EXPECT_NE(digest({{"shard", 2}, {"tensor", 2}}, 4), digest({{"tensor", 2}, {"shard", 2}}, 4));
  EXPECT_NE(digest({{"shard", 4}}, 4), digest({{"shards", 4}}, 4));
  EXPECT_NE(digest({{"shard", 4}}, 4), digest({{"shard", 4}, {"tensor", 1}}, 4));
  EXPECT_EQ(digest({{"shard", -1}, {"tensor", 2}}, 4), digest({{"shard", 2}, {"tensor", 2}}, 4));
}

// ---- what is refused -------------------------------------------------------------------------------------------------

TEST(LayoutRefusals, NameWhatWouldFit) {
  EXPECT_THAT(refusal_of({{"pp", 2}, {"shard", 3}, {"tensor", 1}}, 8),
              AllOf(HasSubstr("[mesh.shard]"), HasSubstr("pp 2 x shard 3 makes 6 ranks, but the job has 8 ranks (2^3)"),
                    HasSubstr("pp 2 x shard 4"), HasSubstr("start 6 ranks")));
  EXPECT_THAT(refusal_of({{"pp", 1}, {"shard", -1}, {"tensor", 3}}, 8),
              AllOf(HasSubstr("[mesh.tensor]"), HasSubstr("tensor 3 (3 ranks) does not divide the job's 8 ranks (2^3)"),
                    HasSubstr("shard 2 x tensor 4"), HasSubstr("shard 4 x tensor 2"), HasSubstr("start 6 or 9 ranks")));
  EXPECT_THAT(refusal_of({{"shard", -1}, {"tensor", 16}}, 8), AllOf(HasSubstr("tensor 8"), HasSubstr("start 16 ranks")));
  EXPECT_THAT(refusal_of({{"shard", 0}}, 8),
              AllOf(HasSubstr("[mesh.shard]"), HasSubstr("0 ranks along shard: expected 1 or more"), HasSubstr("shard 8")));
  EXPECT_THAT(refusal_of({{"pp", 2}, {"tensor", -7}}, 8),
              AllOf(HasSubstr("-7 ranks along tensor"), HasSubstr("pp 2 x tensor 4")));
  EXPECT_THAT(refusal_of({{"shard", -1}, {"context", -1}}, 8), HasSubstr("both shard and context"));
  EXPECT_THAT(refusal_of({{"shard", 2}, {"shard", 4}}, 8), HasSubstr("'shard' is there twice"));
  EXPECT_THAT(refusal_of({{"Shard", 8}}, 8), HasSubstr("axis name 'Shard'"));
  EXPECT_THAT(refusal_of({{"", 8}}, 8), HasSubstr("axis name ''"));
  EXPECT_THAT(refusal_of({}, 8), HasSubstr("has 1 rank, but the job has 8"));
  EXPECT_THAT(refusal_of({{"shard", 1}}, 0), HasSubstr("a job of 0 ranks"));
  EXPECT_THAT(refusal_of({{"shard", 100000}, {"tensor", 100000}, {"pp", 100000}}, 8), HasSubstr("far more"));
  EXPECT_THAT(refusal_of({{"pp", 2}, {"shard", 2}}, 1),
              AllOf(HasSubstr("1 rank has no axis above 1"), HasSubstr("start 4 ranks")));
  EXPECT_THAT(refusal_of({{"pp", 1}, {"shard", 4}, {"tensor", 1}}, 8),
              AllOf(HasSubstr("[mesh.shard]"), HasSubstr("8 ranks make shard 8, or")));
  EXPECT_THAT(refusal_of({{"shard", 7}}, 100000), HasSubstr("2^5 x 5^5"));
}

/// Whatever is asked over whatever number of ranks: it is a mesh, or the refusal names meshes that are.
TEST(LayoutRefusals, EveryFixIsAMeshAndNothingIsNearer) {
  int refused = 0;
  for (const int world : {1, 2, 6, 7, 8, 12, 30, 97, 1000}) {
    for (const int pp : {1, 2, 3, 5, 0}) {
      for (const int shard : {-1, 1, 2, 4, 6, 1000000}) {
        for (const int tensor : {1, 2, 3, 7, 8}) {
          const std::vector<MeshAxis> axes{{"pp", pp}, {"shard", shard}, {"tensor", tensor}};
          const auto fault = MeshLayout::check(axes, world);
          const std::int64_t product = static_cast<std::int64_t>(pp) * tensor * (shard == -1 ? 1 : shard);
          const bool fits = pp > 0 && (shard == -1 ? world % product == 0 : product == world);
          ASSERT_EQ(!fault.has_value(), fits) << pp << " " << shard << " " << tensor << " over " << world;
          if (!fault) {
            EXPECT_EQ(MeshLayout::make(axes, world).world(), world);
            continue;
          }
          ++refused;
          ASSERT_FALSE(fault->fixes.empty());
          EXPECT_FALSE(fault->axis.empty()) << fault->message;
          EXPECT_LE(fault->fixes.size(), 3u);
          int least = 3;
          for (const auto& fix : fault->fixes) {
            ASSERT_EQ(MeshLayout::make(fix, world).world(), world) << fault->message;
            int changed = 0;
            for (std::size_t i = 0; i < axes.size(); ++i) changed += axes[i].size != -1 && fix[i].size != axes[i].size;
            EXPECT_GE(changed, 1);
            least = std::min(least, changed);
          }
          // When the change of one axis can do it, that is what is offered.
          bool one = false;
          for (std::size_t i = 0; i < axes.size(); ++i) {
            if (axes[i].size == -1) continue;
            auto other = axes;
            for (other[i].size = 1; other[i].size <= world && !one; ++other[i].size) one = !MeshLayout::check(other, world);
          }
          EXPECT_EQ(least == 1, one) << fault->message;
        }
      }
    }
  }
  EXPECT_GT(refused, 500);
}

TEST(LayoutRefusals, SlicesAndFlattenings) {
  const MeshLayout m = train_mesh(2, 1, 2, 1, 2);
  const auto slice = [&](Names axes) { return refusal([&] { m.slice(axes); }); };
  EXPECT_THAT(slice({"shrad"}), AllOf(HasSubstr("no axis 'shrad'"), HasSubstr("did you mean 'shard'"),
                                      HasSubstr("pp, replicate, shard, context, tensor")));
  EXPECT_THAT(slice({"tensor", "pp"}), HasSubstr("'pp' comes before 'tensor'"));
  EXPECT_THAT(slice({"pp", "pp"}), HasSubstr("named twice"));
  EXPECT_THAT(slice({}), HasSubstr("no axes"));
  EXPECT_THAT(refusal([&] {
                m.flatten(Names{"pp", "shard"}, "x");
              }),
              AllOf(HasSubstr("not neighbours"), HasSubstr("'replicate' lies between")));
  EXPECT_THAT(refusal([&] { m.flatten(Names{"shard", "context"}, "tensor"); }), HasSubstr("'tensor' is there twice"));
  EXPECT_EQ(m.flatten(Names{"shard", "context"}, "shard").size("shard"), 2);  // the name of one that goes is free
  EXPECT_THAT(refusal([&] {
                m.unflatten("shard", {{"a", 3}, {"b", 1}});
              }),
              AllOf(HasSubstr("unflatten 'shard' of 2 ranks"), HasSubstr("makes 3 ranks")));
  EXPECT_THAT(refusal([&] { m.unflatten("shard", {{"a", 2}, {"tensor", 1}}); }), HasSubstr("'tensor' is there twice"));
  EXPECT_THAT(refusal([&] { m.unflatten("shard", {}); }), HasSubstr("into no axes"));
  EXPECT_THAT(refusal([&] { MeshLayout::make({{"tensor", 2}, {"pp", 2}}, 4).expert_view(2); }), HasSubstr("in this order"));
  EXPECT_THAT(refusal([&] { m.expert_view(0); }), HasSubstr("expert 0"));
}

TEST(LayoutRefusals, RanksOutside) {
  const MeshLayout m = train_mesh(2, 1, 2, 1, 2);
  for (const int rank : {-1, 8}) {
    EXPECT_THAT(refusal([&] { m.coordinate(rank); }, Fault::programming), HasSubstr("expected 0 to 7"));
    EXPECT_THAT(refusal([&] { m.coordinate(rank, "pp"); }, Fault::programming), HasSubstr("expected 0 to 7"));
    EXPECT_THAT(refusal([&] { m.group(rank, "pp"); }, Fault::programming), HasSubstr("expected 0 to 7"));
  }
  EXPECT_THAT(refusal(
                  [&] {
                    m.rank_at(std::vector<int>{0, 0, 2, 0, 0});
                  },
                  Fault::programming),
              HasSubstr("along shard: expected 0 to 1"));
  EXPECT_THAT(refusal([&] { m.rank_at(std::vector<int>{0, 0}); }, Fault::programming), HasSubstr("expected 5"));
}

// ---- size ------------------------------------------------------------------------------------------------------------

TEST(Layout, AHundredThousandRanksTakeMilliseconds) {
  const std::clock_t begin = std::clock();
  const MeshLayout m =
      MeshLayout::make({{"pp", 10}, {"replicate", 5}, {"shard", -1}, {"context", 5}, {"tensor", 8}}, 100000);
  const auto tensor = m.groups(Names{"tensor"});
  const auto state = m.groups(Names{"shard", "context"});
  std::int64_t sum = 0;
  for (int rank = 0; rank < m.world(); ++rank) sum += m.coordinate(rank, "shard");
  const auto fault = MeshLayout::check({{"pp", 7}, {"shard", -1}, {"tensor", 8}}, 100000);
  const MeshLayout view = m.expert_view(40);
  const double seconds = double(std::clock() - begin) / CLOCKS_PER_SEC;  // of the processor: others may have it meanwhile
  EXPECT_EQ(m.size("shard"), 50);
  EXPECT_EQ(tensor.size(), 12500u);
  EXPECT_EQ(state.size(), 400u);
  EXPECT_EQ(state.front().size(), 250u);
  EXPECT_EQ(sum, 100000ll / 50 * (49 * 50 / 2));
  EXPECT_EQ(view.size("expert_shard"), 50);
  ASSERT_TRUE(fault.has_value());
  for (const auto& fix : fault->fixes) EXPECT_EQ(MeshLayout::make(fix, 100000).world(), 100000);
  RecordProperty("milliseconds", static_cast<int>(1e3 * seconds));
  EXPECT_LT(seconds, 0.1);  // a few milliseconds on an idle machine
}

}  // namespace
}  // namespace capstan
