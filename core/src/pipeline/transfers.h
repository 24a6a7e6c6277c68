// defines: Packet, Shapes, Transfers: carried values and gradients on their way between two pipeline ranks.
#pragma once
#include "comm/communicator.h"

#include <capstan/model.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace capstan::pipeline {

/// Shape and element type of one carried value of a microbatch.
struct ValueShape {
  bool present = false;  ///< false: no call has written it
  DType dtype = DType::f32;
  Dims dims;
  bool operator==(const ValueShape&) const = default;
  bool has_gradient() const { return present && (dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16); }
};

/// What decides about the shapes of a batch's carried values: rows and sequences of its spaces, and whether it is for training.
using Geometry = std::vector<std::int64_t>;
Geometry geometry(const ForwardContext& context);

/// Shapes by (stage that writes, geometry). Both ends of a cut fill theirs in the same order, so that both know which
/// microbatch brings its shapes along.
using KnownShapes = std::map<std::pair<int, Geometry>, std::vector<ValueShape>>;

/// Values that are asked for now and waited for where they are used.
struct Packet {
  std::vector<Tensor> values;  ///< in the order of their names; undefined where there is none
  std::vector<ValueShape> shapes;
  std::vector<Handle> handles;
};

/// Sends and receives of one step: values over `pp`, their shapes over `hosts`, which may be the same. Between two ranks everything
/// arrives in the order of sending.
class Transfers {
 public:
  Transfers(Communicator& pp, Communicator& hosts, Device& device, KnownShapes& known) : pp_(pp), hosts_(hosts), device_(device), known_(known) {}

  /// What `stage` wrote, to rank `to`. Error(programming) when a batch of this geometry had other shapes before.
  void send_values(int to, int stage, const Geometry& geometry, const std::vector<std::string>& names, const std::vector<Tensor>& values);
  std::shared_ptr<Packet> receive_values(int from, int stage, const Geometry& geometry, std::size_t count);
  /// Both sides know the shapes.
  void send_gradients(int to, const std::vector<Tensor>& gradients);
  std::shared_ptr<Packet> receive_gradients(int from, const std::vector<ValueShape>& shapes);

  /// Until the packet's values are there.
  void wait(int from, Packet& packet);
  /// Starts what can be started, frees what has been sent.
  void progress();
  /// Until everything is sent.
  void finish();

 private:
  /// A packet that cannot be received yet: its shapes, or those of one before it, are on their way.
  struct Waiting {
    std::shared_ptr<Packet> packet;
    int stage = -1;                // its values' shapes are those of this stage and geometry; -1: known
    Geometry geometry;
    std::size_t count = 0;
    std::vector<std::int64_t> header;  // not empty: the shapes come here
    Handle header_handle;
    bool header_asked = false;
  };
  void post(int from, Waiting waiting);
  /// Takes the queue of `from` as far as it goes; `until` not null: waits for headers until that packet is under way.
  void advance(int from, const Packet* until);

  Communicator &pp_, &hosts_;
  Device& device_;
  KnownShapes& known_;
  std::map<int, std::deque<Waiting>> waiting_;  // by peer
  struct Sent { std::vector<Tensor> values; std::shared_ptr<std::vector<std::int64_t>> header; std::vector<Handle> handles; };
  std::deque<Sent> sent_;
  std::map<std::pair<int, Geometry>, bool> asked_;  // shapes that are under way, by stage and geometry
};

}  // namespace capstan::pipeline
