// A rank's view of the mesh: the communicators along its axes, and the refusal of ranks that mean different meshes.
#include "mesh/mesh.h"

#include <capstan/error.h>

#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace capstan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Names = std::vector<std::string_view>;

MeshLayout train_mesh(int pp, int replicate, int shard, int context, int tensor) {
  return MeshLayout::make({{"pp", pp}, {"replicate", replicate}, {"shard", shard}, {"context", context}, {"tensor", tensor}},
                          pp * replicate * shard * context * tensor);
}

/// Runs `body` as each rank of a job of threads; what each threw, "" for nothing.
std::vector<std::string> on_ranks(int size, const std::function<void(std::shared_ptr<World>)>& body, double timeout = 20) {
  auto worlds = make_thread_worlds(size, timeout);
  std::vector<std::string> thrown(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      const std::shared_ptr<World> world = std::move(worlds[static_cast<std::size_t>(r)]);
      try {
        body(world);
      } catch (const std::exception& e) {
        thrown[static_cast<std::size_t>(r)] = e.what();
        world->fail_job(e.what());
      }
    });
  }
  for (std::thread& t : threads) t.join();
  return thrown;
}

void expect_all_well(const std::vector<std::string>& thrown) {
  for (std::size_t r = 0; r < thrown.size(); ++r) EXPECT_EQ(thrown[r], "") << "rank " << r;
}

TEST(Mesh, EveryAxisHasTheGroupsOfItsLayout) {
  for (const MeshLayout& layout :
       {train_mesh(1, 1, 8, 1, 1), train_mesh(2, 1, 2, 1, 2), train_mesh(1, 2, 1, 2, 2), train_mesh(1, 1, 1, 1, 6)}) {
    expect_all_well(on_ranks(layout.world(), [&](std::shared_ptr<World> world) {
      Mesh mesh(world, layout);
      const int rank = mesh.rank();
      for (const char* axes : {"pp", "replicate", "shard", "context", "tensor"}) {
        Communicator& comm = mesh.comm(axes, "reduce");
        EXPECT_EQ(comm.ranks(), layout.group(rank, axes));
        EXPECT_EQ(comm.rank(), layout.coordinate(rank, axes));
        // What goes round a group is what its members are.
        double sum = rank;
        comm.all_reduce(&sum, 1, DType::f64).wait();
        const auto members = layout.group(rank, axes);
        EXPECT_EQ(sum, std::accumulate(members.begin(), members.end(), 0));
      }
      Communicator& both = mesh.comm("shard+context", "gather");
      EXPECT_EQ(both.ranks(), layout.group(rank, Names{"shard", "context"}));
      EXPECT_EQ(mesh.comm("world").size(), layout.world());
      EXPECT_EQ(mesh.data_ranks(), layout.size("replicate") * layout.size("shard"));
      EXPECT_LT(mesh.data_rank(), mesh.data_ranks());
    }));
  }
}

TEST(Mesh, LanesAreApartAndEqualGroupsShareOne) {
  const MeshLayout layout = train_mesh(1, 1, 4, 1, 1);
  expect_all_well(on_ranks(4, [&](std::shared_ptr<World> world) {
    Mesh mesh(world, layout);
    const std::size_t at_start = mesh.communicators().size();
    EXPECT_EQ(&mesh.comm("shard", "gather"), &mesh.comm("shard", "gather"));
    EXPECT_NE(&mesh.comm("shard", "gather"), &mesh.comm("shard", "reduce"));
    EXPECT_EQ(&mesh.comm("shard+context", "gather"), &mesh.comm("shard", "gather"));  // context has one rank
    EXPECT_EQ(mesh.communicators().size(), at_start + 2);
    EXPECT_EQ(mesh.comm("shard", "gather").name(), "shard/gather");
  }));
}

TEST(Mesh, AxesOfOneRankDoNothing) {
  Mesh mesh(make_single_world(), MeshLayout());
  float x = 3;
  for (const char* axes : {"pp", "shard+context", "tensor", "expert", "world"}) {
    mesh.comm(axes).all_reduce(&x, 1, DType::f32).wait();
    EXPECT_EQ(mesh.comm(axes).size(), 1);
  }
  EXPECT_EQ(x, 3);
  try {
    mesh.comm("shrad");
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.fault(), Fault::programming);
    EXPECT_THAT(e.what(), HasSubstr("no axis is called 'shrad'"));
  }
}

TEST(Mesh, ReplicasOfACutAreNeighbours) {
  const MeshLayout layout = train_mesh(1, 1, 1, 1, 6);
  expect_all_well(on_ranks(6, [&](std::shared_ptr<World> world) {
    Mesh mesh(world, layout);
    for (const int ways : {1, 2, 3, 6}) {
      Communicator& comm = mesh.tensor_replicas(ways);
      EXPECT_EQ(comm.size(), 6 / ways);
      EXPECT_EQ(comm.ranks().front(), mesh.rank() / (6 / ways) * (6 / ways));
      EXPECT_EQ(comm.ranks().back() - comm.ranks().front(), 6 / ways - 1);
    }
    EXPECT_THROW(mesh.tensor_replicas(4), Error);
  }));
}

TEST(Mesh, RanksThatMeanAnotherMeshAreNamed) {
  const MeshLayout one = train_mesh(1, 1, 8, 1, 1), other = train_mesh(1, 1, 4, 1, 2);
  const auto thrown = on_ranks(8, [&](std::shared_ptr<World> world) {
    const int rank = world->rank();
    Mesh mesh(world, rank == 3 || rank == 5 ? other : one);
  });
  for (const std::string& text : thrown) {  // all say the same, so that whichever is printed will do
    EXPECT_THAT(text, AllOf(HasSubstr("ranks 0 to 2, 4, 6 to 7: shard 8 (8 ranks)"),
                            HasSubstr("ranks 3, 5: shard 4 x tensor 2 (8 ranks)")));
    EXPECT_EQ(text, thrown.front());
  }
}

TEST(Mesh, EqualWordsWithOtherAxesAreToldApart) {
  const auto thrown = on_ranks(2, [&](std::shared_ptr<World> world) {
    const bool first = world->rank() == 0;
    Mesh mesh(world, first ? MeshLayout::make({{"shard", 2}}, 2) : train_mesh(1, 1, 2, 1, 1));
  });
  for (const std::string& text : thrown)
    EXPECT_THAT(text, AllOf(HasSubstr("rank 0: shard 2 (2 ranks) ["), HasSubstr("rank 1: shard 2 (2 ranks) [")));
}

TEST(Mesh, AMeshOfAnotherSizeThanTheJobIsRefusedOnAllRanks) {
  const auto thrown = on_ranks(4, [&](std::shared_ptr<World> world) { Mesh mesh(world, train_mesh(1, 1, 2, 1, 1)); });
  for (const std::string& text : thrown) EXPECT_THAT(text, HasSubstr("a mesh of shard 2 (2 ranks) over a job of 4 ranks"));
}

TEST(Mesh, TheFirstRankMayTakeLongerThanTheTimeout) {
  std::atomic<int> done{0};
  expect_all_well(on_ranks(
      3,
      [&](std::shared_ptr<World> world) {
        Mesh mesh(world, train_mesh(1, 1, 3, 1, 1));
        mesh.on_first_rank([&] {
          std::this_thread::sleep_for(std::chrono::milliseconds(4000));
          done = 1 + mesh.rank();
        });
        EXPECT_EQ(done, 1);  // on every rank: none goes on before it is done
        mesh.on_first_rank([] {});
      },
      2));
}

TEST(Mesh, WhatTheFirstRankThrowsEndsAll) {
  const auto thrown = on_ranks(3, [&](std::shared_ptr<World> world) {
    Mesh mesh(world, train_mesh(1, 1, 3, 1, 1));
    mesh.on_first_rank([] { throw std::runtime_error("the disk is full"); });
  });
  EXPECT_EQ(thrown[0], "the disk is full");
  for (const int r : {1, 2})
    EXPECT_THAT(thrown[static_cast<std::size_t>(r)], AllOf(HasSubstr("rank 0"), HasSubstr("the disk is full")));
}

}  // namespace
}  // namespace capstan
