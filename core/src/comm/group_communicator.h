// defines: GroupCommunicator: the Communicator of several ranks: asynchronous lanes over the blocking collectives.
#pragma once
#include "comm/communicator.h"
#include "comm/lane.h"
#include "comm/shared_world.h"
#include "comm/transport.h"

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace capstan::comm {

/// Collectives of one communicator run one after the other on one lane; each (peer, direction) of send and receive has
/// its own, so that a send that waits for room does not hold up the receive that makes it.
class GroupCommunicator final : public Communicator {
 public:
  GroupCommunicator(std::shared_ptr<WorldCore> core, std::string name, std::vector<int> ranks, int me);
  ~GroupCommunicator() override;

  Handle all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) override;
  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) override;
  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override;
  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override;
  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override;
  Handle all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                      std::span<const std::int64_t> receive_counts, DType dtype) override;
  Handle broadcast(void* data, std::int64_t count, DType dtype, int root) override;
  Handle send(const void* data, std::int64_t count, DType dtype, int to) override;
  Handle receive(void* data, std::int64_t count, DType dtype, int from) override;
  void barrier() override;

 private:
  struct Peer { std::shared_ptr<Lane> lane; std::uint64_t sequence = 0; };
  Handle launch(const Descriptor& call, double bytes, std::function<void()> body);
  Handle launch_peer(Collective collective, int peer, double bytes, std::function<void(std::uint64_t)> body);
  Handle gather(Collective collective, const void* in, void* out, std::vector<std::int64_t> counts, DType dtype);
  Handle exchange(Collective collective, const void* in, std::vector<std::int64_t> send_counts, void* out,
                  std::vector<std::int64_t> receive_counts, DType dtype);
  Descriptor call(Collective collective, std::int64_t count, DType dtype, Reduction op = Reduction::sum, int root = 0) const;
  std::function<void()> timed(Collective collective, double bytes, std::function<void()> body);
  std::shared_ptr<Lane> make_lane();
  [[noreturn]] void wrong(Collective collective, const std::string& what) const;

  std::shared_ptr<WorldCore> core_;
  std::unique_ptr<Group> group_;
  std::mutex mutex_;
  std::uint64_t sequence_ = 0;
  std::shared_ptr<Lane> lane_;
  std::map<std::pair<int, bool>, Peer> peers_;
};

}  // namespace capstan::comm
