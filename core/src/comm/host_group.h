// defines: HostGroup: the collectives of one communicator among the ranks of one host, through staging buffers.
#pragma once
#include "comm/communicator.h"
#include "comm/segment.h"
#include "comm/transport.h"
#include "comm/watch.h"

#include <capstan/dtype.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace capstan::comm {

/// Each rank copies what others need into its own buffer (three of them, used in turn), posts its tick, waits for the
/// ticks of the others and reads or adds from their buffers in rank order. A buffer is written again two rounds later: a
/// rank that posted round k has read everything of round k-2. Where the data of all ranks lies in the host's shared memory
/// (World::shared_memory), nothing is staged: everybody reads it where it is, in the same order. All methods block and are called by one thread at a time, in
/// the same order on all members.
class HostGroup final : public Group {
 public:
  HostGroup(Watch& watch, std::uint64_t key, const std::string& name, std::vector<int> world_ranks);
  ~HostGroup() override;
  HostGroup(const HostGroup&) = delete;
  HostGroup& operator=(const HostGroup&) = delete;

  int size() const { return size_; }
  int rank() const { return me_; }
  const std::vector<int>& world_ranks() const { return ranks_; }

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
  const Site& site() const { return site_; }
  Site site(Collective collective, std::uint64_t sequence) const { return {slot_, collective, sequence}; }

 private:
  std::byte* mine() const { return segment_.stage(*slot_, me_, round_); }
  const std::byte* theirs(int r, std::uint32_t round) const { return segment_.stage(*slot_, r, round); }
  std::int64_t stage_bytes() const { return static_cast<std::int64_t>(slot_->stage_bytes); }
  void post();
  /// All members' ticks have come to `tick`.
  void wait_all(std::uint32_t tick);
  void compare_calls();
  /// Whether all ranks' `data` lies in shared memory; sources_ then say where. Not asked for small payloads. A round of its own:
  /// when it returns everybody's data is there.
  bool direct(const void* data, std::int64_t bytes);
  const std::byte* source(int r) const { return sources_[static_cast<std::size_t>(r)]; }
  /// Everybody has read what it wanted of the others' data.
  void close() { barrier(); }
  // stage(k, buffer) fills this rank's buffer of round k; consume(k, round) reads everybody's of that round.
  template <class Stage, class Consume>
  void rounds(std::int64_t count, Stage&& stage, Consume&& consume);

  Watch& watch_;
  Segment segment_;
  std::vector<int> ranks_;
  int size_, me_;
  Slot* slot_ = nullptr;
  Member* members_ = nullptr;
  Site site_;
  Descriptor call_;
  std::vector<const std::byte*> sources_;
  bool compared_ = true;
  std::uint32_t tick_ = 0, round_ = 0;
};

}  // namespace capstan::comm
