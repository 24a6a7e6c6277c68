// The shared memory's allocator and the directory of communicators in it.
#include "comm/segment.h"

#include <capstan/error.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace capstan::comm {
namespace {

constexpr std::uint64_t kMagic = 0x4341505354414e31;
// A buffer holds what two ranks exchange in one round: large enough that the round's two waits do not count, small
// enough that the bytes are still in a core's second cache when the peer reads them.
constexpr std::size_t kStageBytes = 512 << 10, kLeastStageBytes = 16 << 10;

}  // namespace

std::string_view name_of(Collective collective) {
  constexpr std::string_view names[] = {"none", "all_reduce", "reduce_scatter", "all_gather", "all_gather_v", "all_to_all",
                                        "all_to_all_v", "broadcast", "send", "receive", "barrier"};
  const auto i = static_cast<std::size_t>(collective);
  return i < std::size(names) ? names[i] : "unknown";
}

// A lock that a rank may die in: others give up instead of waiting for ever.
class Segment::Locked {
 public:
  Locked(const Segment& segment, double timeout) : lock_(segment.header().lock) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout);
    std::uint32_t free = 0;
    while (!lock_.compare_exchange_weak(free, 1, std::memory_order_acquire)) {
      free = 0;
      sched_yield();
      if (std::chrono::steady_clock::now() > deadline)
        fail(Fault::runtime, "communicator", "the directory of communicators stayed locked for " + std::to_string(timeout) +
                                                 " s: a rank of this host ended while it made a communicator");
    }
  }
  ~Locked() { lock_.store(0, std::memory_order_release); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  Word& lock_;
};

Segment Segment::format(std::shared_ptr<void> memory, std::size_t bytes, int local_size, int world_of_hosts) {
  Segment segment(std::move(memory));
  auto* header = new (segment.memory_.get()) SegmentHeader;
  header->bytes = bytes;
  header->used = (sizeof(SegmentHeader) + 4095) & ~std::size_t{4095};
  header->local_size = local_size;
  header->pages_offset = segment.allocate(sizeof(StatusPage) * static_cast<std::size_t>(local_size));
  for (int r = 0; r < local_size; ++r) new (&segment.page(r)) StatusPage;
  header->remote_offset = segment.allocate(sizeof(RemotePage) * static_cast<std::size_t>(world_of_hosts));
  for (int r = 0; r < world_of_hosts; ++r) new (&segment.remote(r)) RemotePage;
  header->magic = kMagic;
  return segment;
}

Segment Segment::attach(std::shared_ptr<void> memory) {
  Segment segment(std::move(memory));
  if (segment.header().magic != kMagic)
    fail(Fault::runtime, "communicator", "the ranks of this host do not see the same shared memory: their builds differ, "
                                         "or the system gives each its own (containers without a shared /dev/shm)");
  return segment;
}

std::uint64_t Segment::allocate(std::size_t bytes) const {
  SegmentHeader& h = header();
  const std::uint64_t at = (h.used + 63) & ~std::uint64_t{63};
  if (at + bytes > h.bytes)
    fail(Fault::runtime, "communicator", "the host's shared memory of " + std::to_string(h.bytes >> 20) +
                                             " MiB has no room for another communicator: make /dev/shm larger");
  h.used = at + bytes;
  return at;
}

Slot* Segment::join(std::uint64_t key, std::string_view name, std::span<const int> world_ranks, int me,
                    double timeout) const {
  const Locked locked(*this, timeout);
  SegmentHeader& h = header();
  const int n = static_cast<int>(world_ranks.size());
  Slot* found = nullptr;
  Slot* spare = nullptr;
  for (std::uint64_t at = h.first_slot; at != 0 && !found;) {
    Slot* slot = this->at<Slot>(at);
    if (slot->free && slot->size == n && !spare) spare = slot;
    if (!slot->free && slot->key == key && slot->size == n && name.substr(0, sizeof slot->name - 1) == slot->name &&
        !members(*slot)[me].joined) found = slot;
    at = slot->next;
  }
  if (!found) {
    const auto un = static_cast<std::size_t>(n);
    found = spare;
    if (!found) {
      const std::uint64_t slot_at = allocate(sizeof(Slot));
      found = new (at<std::byte>(slot_at)) Slot;
      found->free = true;
      found->members_offset = allocate(sizeof(Member) * un);
      found->channels_offset = allocate(sizeof(std::uint64_t) * un * un);
      // A host of many ranks and communicators makes do with smaller buffers.
      const std::size_t least = std::max(kLeastStageBytes, 64 * un), room = (h.bytes - std::min(h.bytes, h.used)) / 16;
      found->stage_bytes = std::clamp(room / (un * Slot::kBuffers), least, std::max(least, kStageBytes)) & ~std::size_t{63};
      found->stage_offset = n == 1 ? 0 : allocate(found->stage_bytes * un * Slot::kBuffers);
      std::memset(at<std::byte>(found->channels_offset), 0, sizeof(std::uint64_t) * un * un);
      found->size = n;
      (h.last_slot ? at<Slot>(h.last_slot)->next : h.first_slot) = slot_at;
      h.last_slot = slot_at;
    }
    found->key = key;
    found->free = false;
    found->joined = found->left = 0;
    std::memset(found->name, 0, sizeof found->name);
    name.copy(found->name, sizeof found->name - 1);
    for (int r = 0; r < n; ++r) {
      Member* member = new (members(*found) + r) Member;
      member->world_rank = world_ranks[static_cast<std::size_t>(r)];
    }
    auto* channels = at<std::uint64_t>(found->channels_offset);
    for (std::size_t i = 0; i < un * un; ++i)
      if (channels[i]) {
        Channel* c = at<Channel>(channels[i]);
        c->head = 0, c->tail = 0, c->head_waiters = 0, c->tail_waiters = 0;
      }
  }
  members(*found)[me].joined = true;
  ++found->joined;
  return found;
}

void Segment::leave(Slot* slot, double timeout) const {
  const Locked locked(*this, timeout);
  if (++slot->left == slot->size) slot->free = true, slot->key = 0;
}

namespace {
constexpr std::size_t kPage = 4096;
std::size_t pages(std::size_t bytes) { return std::max(kPage, (bytes + kPage - 1) / kPage * kPage); }
}  // namespace

std::byte* Segment::take(std::size_t wanted, double timeout) const {
  const Locked locked(*this, timeout);
  SegmentHeader& h = header();
  const std::size_t bytes = pages(wanted);
  for (std::uint64_t* link = &h.first_free; *link != 0; link = &at<FreeBlock>(*link)->next) {
    const std::uint64_t here = *link;
    FreeBlock* block = at<FreeBlock>(here);
    if (block->bytes < bytes) continue;
    if (block->bytes > bytes) *at<FreeBlock>(here + bytes) = {block->bytes - bytes, block->next}, *link = here + bytes;
    else *link = block->next;
    return at<std::byte>(here);
  }
  // An eighth stays for communicators.
  const std::uint64_t start = (h.used + kPage - 1) / kPage * kPage;
  if (start + bytes > h.bytes / 8 * 7) return nullptr;
  h.used = start + bytes;
  return at<std::byte>(start);
}

void Segment::give_back(std::byte* memory, std::size_t wanted, double timeout) const {
  const Locked locked(*this, timeout);
  SegmentHeader& h = header();
  const std::uint64_t here = offset(memory);
  std::uint64_t before = 0, after = h.first_free;
  while (after != 0 && after < here) before = after, after = at<FreeBlock>(after)->next;
  FreeBlock* block = at<FreeBlock>(here);
  *block = {pages(wanted), after};
  (before ? at<FreeBlock>(before)->next : h.first_free) = here;
  if (after && here + block->bytes == after)
    *block = {block->bytes + at<FreeBlock>(after)->bytes, at<FreeBlock>(after)->next};
  if (FreeBlock* low = before ? at<FreeBlock>(before) : nullptr; low && before + low->bytes == here)
    *low = {low->bytes + block->bytes, block->next};
}

Channel* Segment::channel(Slot* slot, int from, int to, double timeout) const {
  const Locked locked(*this, timeout);
  std::uint64_t& at = this->at<std::uint64_t>(slot->channels_offset)[from * slot->size + to];
  if (!at) {
    at = allocate(Channel::bytes());
    new (this->at<std::byte>(at)) Channel;
  }
  return this->at<Channel>(at);
}

}  // namespace capstan::comm
