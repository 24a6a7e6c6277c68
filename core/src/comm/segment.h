// defines: Segment, StatusPage, Slot, Member, Channel: what the ranks of a host share, laid out in one piece of memory.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::comm {

using Word = std::atomic<std::uint32_t>;
static_assert(Word::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);

/// Text with one writer that others may read at any time.
template <std::size_t N>
class SharedText {
 public:
  void set(std::string_view text) {
    char bytes[N] = {};
    text.copy(bytes, std::min(text.size(), N - 1));
    version_.fetch_add(1, std::memory_order_acq_rel);
    for (std::size_t i = 0; i < N / 8; ++i) {
      std::uint64_t word;
      __builtin_memcpy(&word, bytes + 8 * i, 8);
      words_[i].store(word, std::memory_order_relaxed);
    }
    version_.fetch_add(1, std::memory_order_release);
  }
  std::string get() const {
    char bytes[N];
    for (int tries = 0; tries < 100; ++tries) {
      const std::uint32_t before = version_.load(std::memory_order_acquire);
      for (std::size_t i = 0; i < N / 8; ++i) {
        const std::uint64_t word = words_[i].load(std::memory_order_relaxed);
        __builtin_memcpy(bytes + 8 * i, &word, 8);
      }
      std::atomic_thread_fence(std::memory_order_acquire);
      // A writer that died half way leaves an odd version: what is there is the best there is.
      if (before % 2 == 0 && version_.load(std::memory_order_relaxed) == before) break;
    }
    bytes[N - 1] = 0;
    return bytes;
  }

 private:
  static_assert(N % 8 == 0);
  Word version_{0};
  std::atomic<std::uint64_t> words_[N / 8] = {};
};

enum class Collective : std::uint8_t {
  none, all_reduce, reduce_scatter, all_gather, all_gather_v, all_to_all, all_to_all_v, broadcast, send, receive, barrier
};
std::string_view name_of(Collective collective);

/// A wait that has lasted: who waits for whom in what.
struct WaitEntry {
  Word state{0};                             ///< 0 free, 1 claimed, 2 readable
  std::atomic<std::uint64_t> slot{0};        ///< offset of the communicator's slot
  std::atomic<std::uint8_t> collective{0};
  std::atomic<std::uint64_t> sequence{0};
  std::atomic<std::int32_t> missing{-1};     ///< world rank
};

enum class Phase : std::uint32_t { absent, running, failed, left };

/// What a rank says of itself.
struct alignas(64) StatusPage {
  static constexpr int kWaits = 32;
  std::atomic<std::int32_t> pid{0};
  std::atomic<std::int32_t> world_rank{-1};
  std::atomic<Phase> phase{Phase::absent};
  std::atomic<std::int32_t> blocked{0};      ///< threads that stand in Handle::wait or barrier: not computing
  std::atomic<std::int64_t> step{-1};
  std::atomic<std::int64_t> heartbeat{0};    ///< monotonic ns; 0 where nothing beats
  SharedText<96> doing;
  WaitEntry waits[kWaits];
};

/// What another host says of one of its ranks.
struct RemotePage {
  std::atomic<std::int64_t> heard{0};        ///< monotonic ns of this host
  std::atomic<std::int64_t> step{-1};
  std::atomic<std::int32_t> pid{0};
  std::atomic<Phase> phase{Phase::absent};
  std::atomic<std::uint8_t> gone{0}, stopped{0}, blocked{0};
  SharedText<96> doing;
};

/// The first failure of the job that this host knows of.
struct FailureRecord {
  Word state{0};                             ///< 0 none, 1 being written, 2 readable
  std::atomic<std::int32_t> finder{-1};      ///< world rank that wrote it; -1: it came from another host
  bool names_collective = false;             ///< `text` already says where the rank was expected
  char where[64] = {};                       ///< "rank 2"
  char text[2048] = {};
};

/// Arguments of a collective, the same on all ranks.
struct Descriptor {
  std::uint64_t sequence = 0;
  std::int64_t count = 0, largest = 0;
  std::int32_t root = 0;
  std::uint8_t collective = 0, dtype = 0, op = 0;
  std::uint64_t source = 0;                  ///< of this rank alone: where in the segment its data is; 0: elsewhere
};

struct Member {
  alignas(64) Word tick{0};
  Word waiters{0};
  std::int32_t world_rank = -1;
  bool joined = false;
  alignas(64) Descriptor descriptors[2];     ///< by the sequence number's parity
};

/// One (from, to) pair's ring of blocks.
struct Channel {
  static constexpr std::uint32_t kBlocks = 4;
  static constexpr std::size_t kBlockBytes = 128 << 10, kBlockHeader = 64;
  alignas(64) Word head{0};
  Word head_waiters{0};
  alignas(64) Word tail{0};
  Word tail_waiters{0};
  alignas(64) std::byte data[1];
  std::byte* block(std::uint32_t i) { return data + (i % kBlocks) * (kBlockBytes + kBlockHeader); }
  static constexpr std::size_t bytes() { return 192 + kBlocks * (kBlockBytes + kBlockHeader); }
};

/// One communicator's part of the segment: the members on this host, their ticks and staging buffers.
struct Slot {
  static constexpr int kBuffers = 3;
  std::uint64_t key = 0;
  std::uint64_t next = 0;                    ///< offset of the next slot; 0: the last
  std::uint64_t members_offset = 0, channels_offset = 0, stage_offset = 0;
  std::uint64_t stage_bytes = 0;             ///< of one rank's one buffer
  std::int32_t size = 0;
  std::int32_t joined = 0, left = 0;
  bool free = false;
  char name[96] = {};
};

/// Free memory between buffers, in order of address.
struct FreeBlock { std::uint64_t bytes = 0, next = 0; };

struct SegmentHeader {
  std::uint64_t magic = 0;
  std::uint64_t bytes = 0, used = 0;
  std::uint64_t first_slot = 0, last_slot = 0;
  std::uint64_t pages_offset = 0, remote_offset = 0;
  std::uint64_t first_free = 0;
  std::int32_t local_size = 0;
  Word lock{0};
  FailureRecord failure;
};

/// A view of the shared memory; every rank of the host has its own, over the same bytes.
class Segment {
 public:
  Segment() = default;
  /// Writes the header: one rank of the host does, before any other attaches. `world_of_hosts`: the world's size where it
  /// has several hosts, else 0.
  static Segment format(std::shared_ptr<void> memory, std::size_t bytes, int local_size, int world_of_hosts);
  static Segment attach(std::shared_ptr<void> memory);

  SegmentHeader& header() const { return *static_cast<SegmentHeader*>(memory_.get()); }
  /// Of a world rank on another host; only in worlds of several hosts.
  RemotePage& remote(int world_rank) const { return at<RemotePage>(header().remote_offset)[world_rank]; }
  StatusPage& page(int local_rank) const { return at<StatusPage>(header().pages_offset)[local_rank]; }
  template <class T> T* at(std::uint64_t offset) const { return reinterpret_cast<T*>(static_cast<std::byte*>(memory_.get()) + offset); }
  template <class T> std::uint64_t offset(const T* p) const {
    return static_cast<std::uint64_t>(reinterpret_cast<const std::byte*>(p) - static_cast<const std::byte*>(memory_.get()));
  }
  Member* members(const Slot& slot) const { return at<Member>(slot.members_offset); }
  std::byte* stage(const Slot& slot, int rank, std::uint32_t round) const {
    return at<std::byte>(slot.stage_offset) + (static_cast<std::uint64_t>(rank) * Slot::kBuffers + round % Slot::kBuffers) * slot.stage_bytes;
  }

  /// Finds or makes the slot of (key, name) that this member has not been in yet, and joins it.
  Slot* join(std::uint64_t key, std::string_view name, std::span<const int> local_world_ranks, int me, double timeout) const;
  /// The last member's leaving frees the slot for others.
  void leave(Slot* slot, double timeout) const;
  /// `bytes` on a page of its own; null when there is no room.
  std::byte* take(std::size_t bytes, double timeout) const;
  void give_back(std::byte* memory, std::size_t bytes, double timeout) const;
  /// The offset of memory that lies in the segment; 0 for any other.
  std::uint64_t source(const void* data) const {
    const auto base = reinterpret_cast<std::uintptr_t>(memory_.get()), at = reinterpret_cast<std::uintptr_t>(data);
    return at > base && at - base < header().bytes ? at - base : 0;
  }
  Channel* channel(Slot* slot, int from, int to, double timeout) const;

 private:
  explicit Segment(std::shared_ptr<void> memory) : memory_(std::move(memory)) {}
  std::uint64_t allocate(std::size_t bytes) const;  // under the lock
  class Locked;
  std::shared_ptr<void> memory_;
};

}  // namespace capstan::comm
