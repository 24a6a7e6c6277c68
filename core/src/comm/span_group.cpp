// Collectives across hosts.
#include "comm/span_group.h"

#include "comm/reduce.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>

namespace capstan::comm {
namespace {

// Bytes of all ranks' blocks that are worked on at a time: what a step keeps besides the caller's buffers.
constexpr std::int64_t kWork = 8 << 20;

enum Lane : std::uint32_t { kCollective = 0, kPeer = 1 };

}  // namespace

SpanGroup::SpanGroup(Watch& watch, Transport& transport, std::uint64_t key, const std::string& name,
                     std::vector<int> world_ranks)
    : watch_(watch),
      transport_(transport),
      ranks_(std::move(world_ranks)),
      me_(static_cast<int>(std::find(ranks_.begin(), ranks_.end(), watch.world_rank()) - ranks_.begin())),
      tag_(tag_of(key)) {
  std::map<int, int> place;
  std::vector<int> local;
  for (int m = 0; m < static_cast<int>(ranks_.size()); ++m) {
    const int host = transport_.host_of()[z(ranks_[z(m)])];
    const auto [at, fresh] = place.emplace(host, static_cast<int>(hosts_.size()));
    if (fresh) hosts_.emplace_back();
    hosts_[z(at->second)].push_back(m);
    host_of_.push_back(at->second);
  }
  my_host_ = host_of_[z(me_)];
  for (const int m : hosts_[z(my_host_)]) local.push_back(ranks_[z(m)]);
  local_ = std::make_unique<HostGroup>(watch_, key, name, local);
}

int SpanGroup::local_place(int member) const {
  const Members& mine = hosts_[z(my_host_)];
  return static_cast<int>(std::find(mine.begin(), mine.end(), member) - mine.begin());
}

void SpanGroup::begin(const Descriptor& call) { local_->begin(call); }

SpanGroup::Pending SpanGroup::post_send(int member, const void* data, std::int64_t bytes) {
  return {transport_.send(ranks_[z(member)], tag_ | kCollective, data, bytes), member};
}
SpanGroup::Pending SpanGroup::post_receive(int member, void* data, std::int64_t bytes) {
  return {transport_.receive(ranks_[z(member)], tag_ | kCollective, data, bytes), member};
}

// While messages are under way: an error must not leave their buffers to the caller.
template <class Body>
void SpanGroup::guarded(Body&& body) {
  try {
    body();
  } catch (...) {
    transport_.abandon();
    throw;
  }
}

void SpanGroup::await(const Pending& pending, const Site& site) {
  Message& m = *pending.message;
  const int peer = ranks_[z(pending.peer)];
  guarded([&] { watch_.wait(m.done, m.waiters, peer, site, [](std::uint32_t done) { return done != 0; }); });
  if (m.done.load(std::memory_order_acquire) == 1) return;
  watch_.set_failure(fmt::format("rank {}", peer),
                     fmt::format("a message between rank {} and rank {} failed in {}: {}", watch_.world_rank(), peer,
                                 watch_.describe(site), m.error), true);
  watch_.throw_if_failed(site);
}

void SpanGroup::await(const std::vector<Pending>& pending) {
  for (const Pending& p : pending) await(p, local_->site());
}

void SpanGroup::barrier() {
  local_->barrier();
  // Among the hosts' first members: after round k a host knows of 2^k others that they came.
  const int n = static_cast<int>(hosts_.size());
  if (me_ == hosts_[z(my_host_)][0]) {
    std::byte in{}, out{};
    for (int step = 1; step < n; step *= 2)
      await({post_send(hosts_[z((my_host_ + step) % n)][0], &out, 0),
             post_receive(hosts_[z((my_host_ + n - step) % n)][0], &in, 0)});
  }
  local_->barrier();
}

void SpanGroup::exchange_sums(const std::byte* part, std::int64_t stride, std::int64_t count, std::byte* out, DType dtype,
                              Reduction op) {
  const DType sum = partial_of(dtype);
  const std::int64_t bytes = count * size_of(sum);
  std::vector<Pending> pending;
  std::vector<std::vector<std::byte>> others(hosts_.size());
  std::vector<const void*> from(hosts_.size());
  for (int h = 0; h < static_cast<int>(hosts_.size()); ++h) {
    if (h == my_host_) {
      from[z(h)] = part + me_ * stride;
      continue;
    }
    others[z(h)].resize(static_cast<std::size_t>(bytes));
    from[z(h)] = others[z(h)].data();
    pending.push_back(post_receive(handler(h, me_), others[z(h)].data(), bytes));
  }
  for (int s = 0; s < static_cast<int>(ranks_.size()); ++s)
    if (!here(s) && handler(my_host_, s) == me_) pending.push_back(post_send(s, part + s * stride, bytes));
  await(pending);
  reduce_finish(from, out, count, dtype, op);
}

void SpanGroup::reduce_scatter(const std::byte* in, std::byte* out, std::int64_t count, DType dtype, Reduction op) {
  const DType sum = partial_of(dtype);
  const std::int64_t n = static_cast<std::int64_t>(ranks_.size()), element = size_of(dtype), wide = size_of(sum);
  const std::int64_t chunk = std::max<std::int64_t>(1, kWork / (n * wide));
  std::vector<std::byte> work(static_cast<std::size_t>(n * std::min(chunk, std::max<std::int64_t>(count, 1)) * wide));
  for (std::int64_t at = 0; at == 0 || at < count; at += chunk) {
    const std::int64_t m = std::min(chunk, count - at);
    for (std::int64_t s = 0; s < n; ++s) {
      const void* from[] = {in + (s * count + at) * element};
      reduce_partial(from, work.data() + s * m * wide, m, dtype, op);
    }
    local_->all_reduce(work.data(), n * m, sum, op);
    exchange_sums(work.data(), m * wide, m, out + at * element, dtype, op);
  }
}

void SpanGroup::all_reduce(std::byte* data, std::int64_t count, DType dtype, Reduction op) {
  const DType sum = partial_of(dtype);
  const std::int64_t n = static_cast<std::int64_t>(ranks_.size()), element = size_of(dtype), wide = size_of(sum);
  const std::int64_t chunk = kWork / wide;
  std::vector<std::byte> work;
  std::vector<std::int64_t> place(ranks_.size()), bytes(ranks_.size());
  for (std::int64_t at = 0; at == 0 || at < count; at += chunk) {
    // n equal blocks, the last elements padded with what the first block starts with: never read back.
    const std::int64_t m = std::min(chunk, count - at), block = (m + n - 1) / n;
    work.assign(static_cast<std::size_t>(block * n * wide), std::byte{});
    std::byte* mine = data + at * element;
    const void* from[] = {mine};
    reduce_partial(from, work.data(), m, dtype, op);
    local_->all_reduce(work.data(), m, sum, op);
    for (std::int64_t s = 0; s < n; ++s) {
      place[z(static_cast<int>(s))] = std::min(s * block, m) * element;
      bytes[z(static_cast<int>(s))] = (std::min((s + 1) * block, m) - std::min(s * block, m)) * element;
    }
    std::vector<std::byte> own(static_cast<std::size_t>(std::max<std::int64_t>(block * element, 1)));
    exchange_sums(work.data(), block * wide, block, own.data(), dtype, op);
    all_gather(own.data(), mine, place, bytes);
  }
}

void SpanGroup::all_gather(const std::byte* in, std::byte* out, std::span<const std::int64_t> at,
                           std::span<const std::int64_t> bytes) {
  std::vector<Pending> pending;
  for (int h = 0; h < static_cast<int>(hosts_.size()); ++h)
    if (h != my_host_) pending.push_back(post_send(handler(h, me_), in, bytes[z(me_)]));
  for (int s = 0; s < static_cast<int>(ranks_.size()); ++s)
    if (!here(s) && handler(my_host_, s) == me_) pending.push_back(post_receive(s, out + at[z(s)], bytes[z(s)]));
  std::vector<std::int64_t> local_at, local_bytes;
  for (const int m : hosts_[z(my_host_)]) local_at.push_back(at[z(m)]), local_bytes.push_back(bytes[z(m)]);
  guarded([&] { local_->all_gather(in, out, local_at, local_bytes); });
  await(pending);
  for (int s = 0; s < static_cast<int>(ranks_.size()); ++s)
    if (!here(s)) local_->broadcast(out + at[z(s)], bytes[z(s)], local_place(handler(my_host_, s)));
}

void SpanGroup::all_to_all(const std::byte* in, std::span<const std::int64_t> send_at,
                           std::span<const std::int64_t> send_bytes, std::byte* out,
                           std::span<const std::int64_t> receive_at, std::span<const std::int64_t> receive_bytes) {
  std::vector<Pending> pending;
  std::vector<std::int64_t> sa, sb, ra, rb;
  for (int s = 0; s < static_cast<int>(ranks_.size()); ++s) {
    if (here(s)) {
      sa.push_back(send_at[z(s)]), sb.push_back(send_bytes[z(s)]), ra.push_back(receive_at[z(s)]),
          rb.push_back(receive_bytes[z(s)]);
      continue;
    }
    pending.push_back(post_receive(s, out + receive_at[z(s)], receive_bytes[z(s)]));
    pending.push_back(post_send(s, in + send_at[z(s)], send_bytes[z(s)]));
  }
  guarded([&] { local_->all_to_all(in, sa, sb, out, ra, rb); });
  await(pending);
}

void SpanGroup::broadcast(std::byte* data, std::int64_t bytes, int root) {
  // A binomial tree over the hosts, the root's first; the root speaks for its host, the first member for any other.
  const int n = static_cast<int>(hosts_.size()), root_host = host_of_[z(root)], place = (my_host_ + n - root_host) % n;
  const auto entry = [&](int p) {
    const int h = (p + root_host) % n;
    return h == root_host ? root : hosts_[z(h)][0];
  };
  if (me_ == entry(place)) {
    int step = 1;
    while (step < n && !(place & step)) step *= 2;
    if (place != 0) await(post_receive(entry(place - step), data, bytes), local_->site());
    std::vector<Pending> pending;
    for (int child = step / 2; child > 0; child /= 2)
      if (place + child < n) pending.push_back(post_send(entry(place + child), data, bytes));
    await(pending);
  }
  local_->broadcast(data, bytes, local_place(entry(place)));
}

void SpanGroup::send(const std::byte* data, std::int64_t bytes, DType dtype, int to, std::uint64_t sequence) {
  if (here(to)) return local_->send(data, bytes, dtype, local_place(to), sequence);
  const Site site = local_->site(Collective::send, sequence);
  watch_.throw_if_failed(site);
  await({transport_.send(ranks_[z(to)], tag_ | kPeer, data, bytes), to}, site);
}

void SpanGroup::receive(std::byte* data, std::int64_t bytes, DType dtype, int from, std::uint64_t sequence) {
  if (here(from)) return local_->receive(data, bytes, dtype, local_place(from), sequence);
  const Site site = local_->site(Collective::receive, sequence);
  watch_.throw_if_failed(site);
  await({transport_.receive(ranks_[z(from)], tag_ | kPeer, data, bytes), from}, site);
}

}  // namespace capstan::comm
