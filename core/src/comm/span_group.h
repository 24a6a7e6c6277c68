// defines: SpanGroup: the collectives of a communicator whose ranks are on several hosts.
#pragma once
#include "comm/host_group.h"
#include "comm/transport.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace capstan::comm {

/// Ranks of a host add and copy through its shared memory; what must go to another host goes there once, and all ranks of
/// a host carry a part of it: rank r of the group speaks for block s to the host where s % (its ranks there) picks the partner.
/// Sums add each host's ranks in order, then the hosts in order of their first ranks: the same bits in every run and on all
/// ranks, though not those of the same ranks on one host.
class SpanGroup final : public Group {
 public:
  SpanGroup(Watch& watch, Transport& transport, std::uint64_t key, const std::string& name, std::vector<int> world_ranks);

  /// What tells this communicator's messages from others'.
  static std::uint32_t tag_of(std::uint64_t key) { return static_cast<std::uint32_t>(key >> 36) << 1; }

  void begin(const Descriptor& call) override;
  void barrier() override;
  void all_reduce(std::byte* data, std::int64_t count, DType dtype, Reduction op) override;
  void reduce_scatter(const std::byte* in, std::byte* out, std::int64_t count, DType dtype, Reduction op) override;
  void all_gather(const std::byte* in, std::byte* out, std::span<const std::int64_t> at, std::span<const std::int64_t> bytes) override;
  void all_to_all(const std::byte* in, std::span<const std::int64_t> send_at, std::span<const std::int64_t> send_bytes, std::byte* out,
                  std::span<const std::int64_t> receive_at, std::span<const std::int64_t> receive_bytes) override;
  void broadcast(std::byte* data, std::int64_t bytes, int root) override;
  void send(const std::byte* data, std::int64_t bytes, DType dtype, int to, std::uint64_t sequence) override;
  void receive(std::byte* data, std::int64_t bytes, DType dtype, int from, std::uint64_t sequence) override;

 private:
  /// One host's members, as places in the group.
  using Members = std::vector<int>;
  /// The member of `host` that handles block `block`.
  int handler(int host, int block) const { return hosts_[z(host)][z(block % static_cast<int>(hosts_[z(host)].size()))]; }
  static std::size_t z(int i) { return static_cast<std::size_t>(i); }
  bool here(int member) const { return host_of_[z(member)] == my_host_; }
  int local_place(int member) const;
  /// One of the messages that a step waits for.
  struct Pending { std::shared_ptr<Message> message; int peer; };
  Pending post_send(int member, const void* data, std::int64_t bytes);
  Pending post_receive(int member, void* data, std::int64_t bytes);
  template <class Body>
  void guarded(Body&& body);
  void await(const Pending& pending, const Site& site);
  void await(const std::vector<Pending>& pending);
  /// Sums of all ranks: from this host's sums `part` (blocks of `count`, one for each member, of type `sum`), this rank's block
  /// into `out`.
  void exchange_sums(const std::byte* part, std::int64_t stride, std::int64_t count, std::byte* out, DType dtype, Reduction op);

  Watch& watch_;
  Transport& transport_;
  std::vector<int> ranks_;
  int me_;
  std::vector<Members> hosts_;
  std::vector<int> host_of_;       ///< of each member, into hosts_
  int my_host_ = 0;
  std::unique_ptr<HostGroup> local_;
  std::uint32_t tag_;
};

}  // namespace capstan::comm
