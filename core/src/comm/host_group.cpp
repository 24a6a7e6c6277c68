// Collectives among the ranks of one host.
#include "comm/host_group.h"

#include "comm/reduce.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace capstan::comm {
namespace {

// All-reduces of at most this many bytes: every rank adds everything itself, which saves a wait.
constexpr std::int64_t kSmall = 4096;
// Data of at most this many bytes is staged wherever it lies: a copy costs less than another wait.
constexpr std::int64_t kDirect = 32 << 10;
// Bytes that are added and then copied to the staging buffer while they are in the first cache.
constexpr std::int64_t kFused = 8192;

void move_bytes(std::byte* to, const std::byte* from, std::int64_t bytes) {
  if (bytes > 0 && to != from) std::memmove(to, from, static_cast<std::size_t>(bytes));
}
std::int64_t rounds_of(std::int64_t total, std::int64_t piece) {
  return std::max<std::int64_t>(1, (total + piece - 1) / piece);
}
std::size_t z(int i) { return static_cast<std::size_t>(i); }

}  // namespace

HostGroup::HostGroup(Watch& watch, std::uint64_t key, const std::string& name, std::vector<int> world_ranks)
    : watch_(watch), segment_(watch.segment()), ranks_(std::move(world_ranks)), size_(static_cast<int>(ranks_.size())),
      me_(static_cast<int>(std::find(ranks_.begin(), ranks_.end(), watch.world_rank()) - ranks_.begin())) {
  slot_ = segment_.join(key, name, ranks_, me_, watch_.timeout());
  members_ = segment_.members(*slot_);
  site_.slot = slot_;
}

HostGroup::~HostGroup() {
  try {
    segment_.leave(slot_, watch_.timeout());
  } catch (...) {
    // The directory's lock died with a rank; the slot stays taken.
  }
}

void HostGroup::begin(const Descriptor& call) {
  call_ = call;
  site_.collective = static_cast<Collective>(call.collective);
  site_.sequence = call.sequence;
  watch_.throw_if_failed(site_);
  members_[me_].descriptors[call.sequence % 2] = call;
  compared_ = false;
}

void HostGroup::post() { Watch::post(members_[me_].tick, members_[me_].waiters, ++tick_); }

void HostGroup::wait_all(std::uint32_t tick) {
  for (int r = 0; r < size_; ++r)
    if (r != me_)
      watch_.wait(members_[r].tick, members_[r].waiters, ranks_[z(r)], site_,
                  [tick](std::uint32_t now) { return static_cast<std::int32_t>(now - tick) >= 0; });
  if (!compared_) compare_calls();
}

void HostGroup::compare_calls() {
  compared_ = true;
  for (int r = 0; r < size_; ++r) {
    const Descriptor& its = members_[r].descriptors[call_.sequence % 2];
    if (its.sequence == call_.sequence && its.collective == call_.collective && its.dtype == call_.dtype &&
        its.op == call_.op && its.root == call_.root && its.count == call_.count)
      continue;
    const auto say = [](const Descriptor& d) {
      return fmt::format("{} (count {}, {}, root {}, reduction {})", name_of(static_cast<Collective>(d.collective)), d.count,
                         name_of(static_cast<DType>(d.dtype)), d.root, d.op);
    };
    const std::string text = fmt::format(
        "ranks call different collectives as number {} of communicator '{}': rank {} calls {}, rank {} calls {}; every "
        "member must "
        "make the same calls in the same order",
        call_.sequence, slot_->name, ranks_[z(me_)], say(call_), ranks_[z(r)], say(its));
    watch_.set_failure(fmt::format("rank {}", ranks_[z(r)]), text, true);
    watch_.throw_if_failed(site_);
    fail(Fault::programming, "communicator", text);
  }
}

template <class Stage, class Consume>
void HostGroup::rounds(std::int64_t count, Stage&& stage, Consume&& consume) {
  stage(std::int64_t{0}, mine());
  post();
  for (std::int64_t k = 0; k < count; ++k) {
    const std::uint32_t round = round_++;
    wait_all(tick_);
    if (k + 1 < count) {
      stage(k + 1, mine());
      post();
    }
    consume(k, round);
  }
}

void HostGroup::barrier() {
  if (size_ == 1) return;
  rounds(1, [](std::int64_t, std::byte*) {}, [](std::int64_t, std::uint32_t) {});
}

bool HostGroup::direct(const void* data, std::int64_t bytes) {
  if (bytes <= kDirect) return false;
  members_[me_].descriptors[call_.sequence % 2].source = segment_.source(data);
  rounds(1, [](std::int64_t, std::byte*) {}, [](std::int64_t, std::uint32_t) {});
  sources_.assign(z(size_), nullptr);
  for (int r = 0; r < size_; ++r) {
    const std::uint64_t at = members_[r].descriptors[call_.sequence % 2].source;
    if (at == 0) return false;
    sources_[z(r)] = segment_.at<std::byte>(at);
  }
  return true;
}

void HostGroup::all_reduce(std::byte* data, std::int64_t count, DType dtype, Reduction op) {
  if (size_ == 1) return;
  const std::int64_t element = size_of(dtype);
  std::vector<const void*> from(z(size_));
  if (count * element <= std::min(kSmall, stage_bytes())) {
    return rounds(1, [&](std::int64_t, std::byte* to) { move_bytes(to, data, count * element); },
                  [&](std::int64_t, std::uint32_t round) {
                    for (int r = 0; r < size_; ++r) from[z(r)] = theirs(r, round);
                    reduce_ranks(from, data, count, dtype, op);
                  });
  }
  if (direct(data, count * element)) {
    const std::int64_t line = std::max<std::int64_t>(1, 64 / element);
    const auto begin = [&](int r) { return r == size_ ? count : count / line * r / size_ * line; };
    // Each rank adds its slice and writes the sum to everybody: one pass over all data.
    for (std::int64_t i = begin(me_), end = begin(me_ + 1); i < end;) {
      const std::int64_t m = std::min(kFused / element, end - i);
      for (int r = 0; r < size_; ++r) from[z(r)] = source(r) + i * element;
      reduce_ranks(from, data + i * element, m, dtype, op);
      for (int step = 1; step < size_; ++step)
        move_bytes(const_cast<std::byte*>(source((me_ + step) % size_)) + i * element, data + i * element, m * element);
      i += m;
    }
    return close();
  }
  // Each rank adds its slice of a round's elements and hands the sum on by its buffer, whose part for that slice is free:
  // its own elements need not be staged for itself.
  const std::int64_t chunk = stage_bytes() / element, total = rounds_of(count, chunk);
  const auto begin_of = [&](std::int64_t k, int slice) {  // elements, on cache lines where there are enough
    const std::int64_t m = std::min(chunk, count - k * chunk), line = 64 / element, lines = m / line;
    return slice == size_ ? m : lines * slice / size_ * line;
  };
  const auto stage = [&](std::int64_t k) {
    std::byte *to = mine(), *at = data + k * chunk * element;
    const std::int64_t a = begin_of(k, me_) * element, b = begin_of(k, me_ + 1) * element,
                       end = begin_of(k, size_) * element;
    move_bytes(to, at, a);
    move_bytes(to + b, at + b, end - b);
    post();
  };
  stage(0);
  for (std::int64_t k = 0; k < total; ++k) {
    const std::uint32_t round = round_++;
    std::byte* at = data + k * chunk * element;
    std::byte* own = segment_.stage(*slot_, me_, round);
    wait_all(tick_);
    const std::int64_t end = begin_of(k, me_ + 1);
    for (std::int64_t i = begin_of(k, me_); i < end;) {
      const std::int64_t m = std::min(kFused / element, end - i);
      for (int r = 0; r < size_; ++r) from[z(r)] = (r == me_ ? at : theirs(r, round)) + i * element;
      reduce_ranks(from, at + i * element, m, dtype, op);
      move_bytes(own + i * element, at + i * element, m * element);
      i += m;
    }
    post();
    const std::uint32_t summed = tick_;
    if (k + 1 < total) stage(k + 1);
    wait_all(summed);
    for (int step = 1; step < size_; ++step) {
      const int r = (me_ + step) % size_;
      const std::int64_t a = begin_of(k, r) * element;
      move_bytes(at + a, theirs(r, round) + a, begin_of(k, r + 1) * element - a);
    }
  }
}

void HostGroup::reduce_scatter(const std::byte* in, std::byte* out, std::int64_t count, DType dtype, Reduction op) {
  const std::int64_t element = size_of(dtype), chunk = (stage_bytes() / size_ / 64 * 64) / element;
  std::vector<const void*> from(z(size_));
  if (size_ == 1) return move_bytes(out, in, count * element);
  if (direct(in, size_ * count * element)) {
    for (int r = 0; r < size_; ++r) from[z(r)] = source(r) + me_ * count * element;
    reduce_ranks(from, out, count, dtype, op);
    return close();
  }
  rounds(rounds_of(count, chunk),
         [&](std::int64_t k, std::byte* to) {
           const std::int64_t m = std::min(chunk, count - k * chunk);
           for (int r = 0; r < size_; ++r)
             if (r != me_) move_bytes(to + r * chunk * element, in + (r * count + k * chunk) * element, m * element);
         },
         [&](std::int64_t k, std::uint32_t round) {
           const std::int64_t m = std::min(chunk, count - k * chunk);
           for (int r = 0; r < size_; ++r)
             from[z(r)] = r == me_ ? in + (me_ * count + k * chunk) * element : theirs(r, round) + me_ * chunk * element;
           reduce_ranks(from, out + k * chunk * element, m, dtype, op);
         });
}

void HostGroup::all_gather(const std::byte* in, std::byte* out, std::span<const std::int64_t> at,
                           std::span<const std::int64_t> bytes) {
  std::byte* own = out + at[z(me_)];
  if (size_ == 1) return move_bytes(own, in, bytes[z(me_)]);
  const std::int64_t chunk = stage_bytes(), largest = *std::max_element(bytes.begin(), bytes.end());
  if (direct(in, largest)) {
    for (int step = 0; step < size_; ++step) {
      const int r = (me_ + step) % size_;
      move_bytes(out + at[z(r)], source(r), bytes[z(r)]);
    }
    return close();
  }
  const auto piece = [&](int r, std::int64_t k) { return std::clamp<std::int64_t>(bytes[z(r)] - k * chunk, 0, chunk); };
  rounds(rounds_of(largest, chunk), [&](std::int64_t k, std::byte* to) {
           move_bytes(to, in + k * chunk, piece(me_, k));
           move_bytes(own + k * chunk, in + k * chunk, piece(me_, k));
         },
         [&](std::int64_t k, std::uint32_t round) {
           for (int step = 1; step < size_; ++step) {
             const int r = (me_ + step) % size_;
             move_bytes(out + at[z(r)] + k * chunk, theirs(r, round), piece(r, k));
           }
         });
}

void HostGroup::all_to_all(const std::byte* in, std::span<const std::int64_t> send_at,
                           std::span<const std::int64_t> send_bytes, std::byte* out,
                           std::span<const std::int64_t> receive_at, std::span<const std::int64_t> receive_bytes) {
  move_bytes(out + receive_at[z(me_)], in + send_at[z(me_)], send_bytes[z(me_)]);
  if (size_ == 1) return;
  // First what goes where: nobody else knows the largest block.
  std::int64_t largest = 0;
  std::string wrong;
  rounds(1, [&](std::int64_t, std::byte* to) { std::memcpy(to, send_bytes.data(), send_bytes.size_bytes()); },
         [&](std::int64_t, std::uint32_t round) {
           for (int r = 0; r < size_; ++r)
             for (int to = 0; to < size_; ++to) {
               std::int64_t bytes;
               std::memcpy(&bytes, theirs(r, round) + 8 * to, 8);
               if (r != to) largest = std::max(largest, bytes);
               if (to == me_ && bytes != receive_bytes[z(r)])
                 wrong = fmt::format("rank {} sends {} bytes to rank {}, which expects {}", ranks_[z(r)], bytes,
                                     ranks_[z(me_)], receive_bytes[z(r)]);
             }
         });
  if (!wrong.empty()) {
    watch_.set_failure(fmt::format("rank {}", ranks_[z(me_)]), wrong + " in " + watch_.describe(site_), true);
    watch_.throw_if_failed(site_);
  }
  const std::int64_t chunk = stage_bytes() / size_ / 64 * 64;
  const auto piece = [&](std::int64_t bytes, std::int64_t k) {
    return std::clamp<std::int64_t>(bytes - k * chunk, 0, chunk);
  };
  rounds(rounds_of(largest, chunk),
         [&](std::int64_t k, std::byte* to) {
           for (int r = 0; r < size_; ++r)
             if (r != me_) move_bytes(to + r * chunk, in + send_at[z(r)] + k * chunk, piece(send_bytes[z(r)], k));
         },
         [&](std::int64_t k, std::uint32_t round) {
           for (int step = 1; step < size_; ++step) {
             const int r = (me_ + step) % size_;
             move_bytes(out + receive_at[z(r)] + k * chunk, theirs(r, round) + me_ * chunk, piece(receive_bytes[z(r)], k));
           }
         });
}

void HostGroup::broadcast(std::byte* data, std::int64_t bytes, int root) {
  if (size_ == 1) return;
  const std::int64_t chunk = stage_bytes();
  const auto piece = [&](std::int64_t k) { return std::clamp<std::int64_t>(bytes - k * chunk, 0, chunk); };
  // The root's data alone is read: others offer any address of the segment.
  if (direct(me_ == root ? static_cast<const void*>(data) : slot_, bytes)) {
    move_bytes(data, source(root), me_ == root ? 0 : bytes);
    return close();
  }
  rounds(
      rounds_of(bytes, chunk),
      [&](std::int64_t k, std::byte* to) {
        if (me_ == root) move_bytes(to, data + k * chunk, piece(k));
      },
      [&](std::int64_t k, std::uint32_t round) {
        if (me_ != root) move_bytes(data + k * chunk, theirs(root, round), piece(k));
      });
}

namespace {
struct MessageHeader { std::int64_t bytes; std::uint64_t sequence; std::int32_t dtype; };
static_assert(sizeof(MessageHeader) <= Channel::kBlockHeader);
}  // namespace

void HostGroup::send(const std::byte* data, std::int64_t bytes, DType dtype, int to, std::uint64_t sequence) {
  const Site site = this->site(Collective::send, sequence);
  watch_.throw_if_failed(site);
  Channel& c = *segment_.channel(slot_, me_, to, watch_.timeout());
  const auto chunk = static_cast<std::int64_t>(Channel::kBlockBytes);
  std::uint32_t head = c.head.load(std::memory_order_relaxed);
  for (std::int64_t k = 0; k < rounds_of(bytes, chunk); ++k) {
    watch_.wait(c.tail, c.tail_waiters, ranks_[z(to)], site,
                [head](std::uint32_t tail) { return head - tail < Channel::kBlocks; });
    std::byte* block = c.block(head);
    const MessageHeader header{bytes, sequence, static_cast<std::int32_t>(dtype)};
    std::memcpy(block, &header, sizeof header);
    move_bytes(block + Channel::kBlockHeader, data + k * chunk, std::min(chunk, bytes - k * chunk));
    Watch::post(c.head, c.head_waiters, ++head);
  }
}

void HostGroup::receive(std::byte* data, std::int64_t bytes, DType dtype, int from, std::uint64_t sequence) {
  const Site site = this->site(Collective::receive, sequence);
  watch_.throw_if_failed(site);
  Channel& c = *segment_.channel(slot_, from, me_, watch_.timeout());
  const auto chunk = static_cast<std::int64_t>(Channel::kBlockBytes);
  std::uint32_t tail = c.tail.load(std::memory_order_relaxed);
  for (std::int64_t k = 0; k < rounds_of(bytes, chunk); ++k) {
    watch_.wait(c.head, c.head_waiters, ranks_[z(from)], site, [tail](std::uint32_t head) { return head != tail; });
    const std::byte* block = c.block(tail);
    MessageHeader header;
    std::memcpy(&header, block, sizeof header);
    if (header.bytes != bytes || header.dtype != static_cast<std::int32_t>(dtype)) {
      watch_.set_failure(
          fmt::format("rank {}", ranks_[z(me_)]),
          fmt::format("message {} from rank {} to rank {} in communicator '{}' holds {} bytes of {}, but {} of {} are "
                      "expected: sends and receives of a pair must match in order",
                      sequence, ranks_[z(from)], ranks_[z(me_)], slot_->name, header.bytes,
                      name_of(static_cast<DType>(header.dtype)), bytes, name_of(dtype)),
          true);
      watch_.throw_if_failed(site);
    }
    move_bytes(data + k * chunk, block + Channel::kBlockHeader, std::min(chunk, bytes - k * chunk));
    Watch::post(c.tail, c.tail_waiters, ++tail);
  }
}

}  // namespace capstan::comm
