// defines: Mesh: a layout, this rank's place in it, and its communicators.
#pragma once
#include "comm/communicator.h"
#include "mesh/layout.h"

#include <capstan/export.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capstan {

/// One rank's view of the mesh. Collectives of one communicator run in host order, so each (axes, lane) has its own:
/// a gather does not wait behind a reduction. Axes of size 1 give a communicator of one, which does nothing.
class CAPSTAN_API Mesh {
 public:
  /// Compares the layouts of all ranks, then makes the communicators. Error(input) naming ranks that differ.
  Mesh(std::shared_ptr<World> world, MeshLayout layout);
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  /// Ranks along whose communicators data of the device goes: of their own where that is a GPU. Before the first comm().
  void use_data_world(std::shared_ptr<World> data);

  World& world() const { return *world_; }
  World& data_world() const { return data_ ? *data_ : *world_; }
  const MeshLayout& layout() const { return layout_; }
  int rank() const { return world_->rank(); }
  int size(std::string_view axis) const { return layout_.size(axis); }
  int coordinate(std::string_view axis) const { return layout_.coordinate(rank(), axis); }

  /// Ranks that differ from this one in these axes only ("shard+context" for several, "world" for all). `lane` tells communicators of the
  /// same ranks apart: "gather", "reduce", "control", ... All ranks ask for the same (axes, lane) in the same order. Axes
  /// that come to the same ranks share a lane's communicator. comm() moves memory of the device, host() that of the host; on CPUs
  /// they are the same.
  Communicator& comm(std::string_view axes, std::string_view lane = "main");
  Communicator& host(std::string_view axes, std::string_view lane = "main");
  /// Groups of size("tensor") / ways neighbouring tensor ranks: those that hold the same cut of a parameter that is cut
  /// `ways` ways only.
  Communicator& tensor_replicas(int ways, std::string_view lane = "main");
  Communicator& host_tensor_replicas(int ways, std::string_view lane = "main");

  /// Data-parallel ranks (replicate x shard) and which one this is: whose samples it takes.
  int data_ranks() const { return size("replicate") * size("shard"); }
  int data_rank() const { return coordinate("replicate") * size("shard") + coordinate("shard"); }

  /// Rank 0 does `work`, however long it takes, while the others wait for it and no timeout runs: it works on a thread of
  /// its own, and all ranks stay in touch. Called by all. What `work` throws is thrown on rank 0, and ends the job.
  void on_first_rank(const std::function<void()>& work);

  /// Every communicator made so far.
  std::vector<Communicator*> communicators() const;

 private:
  struct Made {
    bool host;  ///< it moves host memory, where others move a GPU's
    std::string lane;
    std::shared_ptr<Communicator> comm;
  };
  Communicator& along(std::string_view axes, std::string_view lane, bool host);
  Communicator& replicas(int ways, std::string_view lane, bool host);
  Communicator& made(const std::string& name, std::string_view lane, std::vector<int> ranks, bool host);

  std::shared_ptr<World> world_, data_;  ///< data_ null: the same
  MeshLayout layout_;
  std::vector<Made> made_;
};

}  // namespace capstan
