// defines: Transport, Message, Group: messages between hosts, and what one communicator's collectives look like.
#pragma once
#include "comm/communicator.h"
#include "comm/segment.h"
#include "comm/watch.h"

#include <capstan/dtype.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace capstan::comm {

/// A message under way between hosts. Waited for like a peer's tick.
struct Message {
  Word done{0}, waiters{0};       ///< 1: arrived or sent; 2: failed, see error
  std::string error;
};

/// Messages to and from ranks of other hosts. Calls hand over to the transport's own thread and return at once; messages of one
/// (peer, tag) match in order.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual std::shared_ptr<Message> send(int world_rank, std::uint32_t tag, const void* data, std::int64_t bytes) = 0;
  /// Exactly `bytes`: another size is an error of the message.
  virtual std::shared_ptr<Message> receive(int world_rank, std::uint32_t tag, void* data, std::int64_t bytes) = 0;
  /// The job failed: no message under way touches its buffer after this returns.
  virtual void abandon() = 0;
  /// host_of()[world rank]: 0, 1, ... in order of the hosts' first ranks.
  virtual const std::vector<int>& host_of() const = 0;
};

/// The collectives of one communicator, blocking; called by one thread at a time, in the same order on all members, but for
/// send and receive: one thread for each (peer, direction).
class Group {
 public:
  virtual ~Group() = default;
  /// Opens a collective: what this rank calls, compared with what the others call.
  virtual void begin(const Descriptor& call) = 0;
  virtual void barrier() = 0;
  virtual void all_reduce(std::byte* data, std::int64_t count, DType dtype, Reduction op) = 0;
  /// in: size() blocks of `count`; out: this rank's block, which may be in's own.
  virtual void reduce_scatter(const std::byte* in, std::byte* out, std::int64_t count, DType dtype, Reduction op) = 0;
  /// out block r at out + at[r] bytes, bytes[r] long.
  virtual void all_gather(const std::byte* in, std::byte* out, std::span<const std::int64_t> at, std::span<const std::int64_t> bytes) = 0;
  /// Blocks for r at in + send_at[r], from r at out + receive_at[r]; bytes.
  virtual void all_to_all(const std::byte* in, std::span<const std::int64_t> send_at, std::span<const std::int64_t> send_bytes,
                          std::byte* out, std::span<const std::int64_t> receive_at, std::span<const std::int64_t> receive_bytes) = 0;
  virtual void broadcast(std::byte* data, std::int64_t bytes, int root) = 0;
  virtual void send(const std::byte* data, std::int64_t bytes, DType dtype, int to, std::uint64_t sequence) = 0;
  virtual void receive(std::byte* data, std::int64_t bytes, DType dtype, int from, std::uint64_t sequence) = 0;
};

}  // namespace capstan::comm
