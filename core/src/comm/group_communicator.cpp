// Communicators of several ranks.
#include "comm/group_communicator.h"

#include "comm/host_group.h"
#include "comm/reduce.h"
#include "comm/span_group.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace capstan::comm {
namespace {

std::uint64_t key_of(const std::string& name, const std::vector<int>& ranks) {
  return XXH3_64bits_withSeed(ranks.data(), ranks.size() * sizeof(int), XXH3_64bits(name.data(), name.size())) | 1;
}
const std::byte* bytes_of(const void* p) { return static_cast<const std::byte*>(p); }
std::byte* bytes_of(void* p) { return static_cast<std::byte*>(p); }
double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::shared_ptr<Communicator> make_group(std::shared_ptr<WorldCore> core, std::string name, std::vector<int> ranks) {
  const int me = checked_group(name, ranks, core->rank, core->size);
  return std::make_shared<GroupCommunicator>(std::move(core), std::move(name), std::move(ranks), me);
}

GroupCommunicator::GroupCommunicator(std::shared_ptr<WorldCore> core, std::string name, std::vector<int> ranks, int me)
    : Communicator(std::move(name), std::move(ranks), me), core_(std::move(core)),
      lane_(make_lane()) {
  const std::uint64_t key = key_of(this->name(), this->ranks());
  const bool one_host = !core_->several_hosts || std::all_of(this->ranks().begin(), this->ranks().end(), [&](int r) {
    const auto& host = core_->transport->host_of();
    return host[static_cast<std::size_t>(r)] == host[static_cast<std::size_t>(core_->rank)];
  });
  if (one_host) group_ = std::make_unique<HostGroup>(core_->watch, key, this->name(), this->ranks());
  else {
    core_->claim_tag(SpanGroup::tag_of(key), this->name(), this->ranks());
    group_ = std::make_unique<SpanGroup>(core_->watch, *core_->transport, key, this->name(), this->ranks());
  }
}

GroupCommunicator::~GroupCommunicator() {
  lane_->close();
  for (auto& [key, peer] : peers_) peer.lane->close();
}

std::shared_ptr<Lane> GroupCommunicator::make_lane() {
  return std::make_shared<Lane>([this](Collective collective, const std::function<void()>& body) {
    StatusPage& page = core_->watch.own();
    const auto start = std::chrono::steady_clock::now();
    page.blocked.fetch_add(1);
    body();
    page.blocked.fetch_sub(1);
    record(name_of(collective), 0, 0, 0, seconds_since(start));
  });
}

void GroupCommunicator::wrong(Collective collective, const std::string& what) const {
  fail(Fault::programming, fmt::format("{} of communicator '{}'", name_of(collective), name()), what);
}

Descriptor GroupCommunicator::call(Collective collective, std::int64_t count, DType dtype, Reduction op, int root) const {
  if (count < 0) wrong(collective, fmt::format("negative count {}", count));
  if (root < 0 || root >= size()) wrong(collective, fmt::format("root {} of {} ranks", root, size()));
  if ((collective == Collective::all_reduce || collective == Collective::reduce_scatter) && !reducible(dtype))
    wrong(collective, fmt::format("cannot reduce {}: expected f32, f64, bf16, i32, i64 or u8", name_of(dtype)));
  Descriptor d;
  d.count = count;
  d.root = root;
  d.collective = static_cast<std::uint8_t>(collective);
  d.dtype = static_cast<std::uint8_t>(dtype);
  d.op = static_cast<std::uint8_t>(op);
  return d;
}

std::function<void()> GroupCommunicator::timed(Collective collective, double bytes, std::function<void()> body) {
  return [this, collective, bytes, body = std::move(body)] {
    const auto start = std::chrono::steady_clock::now();
    body();
    record(name_of(collective), 1, bytes, seconds_since(start), 0);
  };
}

Handle GroupCommunicator::launch(const Descriptor& call, double bytes, std::function<void()> body) {
  const auto collective = static_cast<Collective>(call.collective);
  const std::scoped_lock lock(mutex_);
  Descriptor numbered = call;
  numbered.sequence = ++sequence_;
  return Handle(lane_->submit(collective, timed(collective, bytes, [this, numbered, body = std::move(body)] {
    group_->begin(numbered);
    body();
  })));
}

Handle GroupCommunicator::launch_peer(Collective collective, int peer, double bytes,
                                      std::function<void(std::uint64_t)> body) {
  if (peer < 0 || peer >= size() || peer == rank())
    wrong(collective, fmt::format("peer {} of {} ranks, this is {}", peer, size(), rank()));
  const std::scoped_lock lock(mutex_);
  Peer& p = peers_[{peer, collective == Collective::send}];
  if (!p.lane) p.lane = make_lane();
  return Handle(
      p.lane->submit(collective, timed(collective, bytes, [body = std::move(body), n = ++p.sequence] { body(n); })));
}

Handle GroupCommunicator::all_reduce(void* data, std::int64_t count, DType dtype, Reduction op) {
  return launch(call(Collective::all_reduce, count, dtype, op),
                2.0 * (size() - 1) / size() * static_cast<double>(count * size_of(dtype)),
                [=, this] { group_->all_reduce(bytes_of(data), count, dtype, op); });
}

Handle GroupCommunicator::reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction op) {
  return launch(call(Collective::reduce_scatter, count, dtype, op),
                (size() - 1.0) * static_cast<double>(count * size_of(dtype)),
                [=, this] { group_->reduce_scatter(bytes_of(in), bytes_of(out), count, dtype, op); });
}

Handle GroupCommunicator::gather(Collective collective, const void* in, void* out, std::vector<std::int64_t> counts,
                                 DType dtype) {
  if (static_cast<int>(counts.size()) != size())
    wrong(collective, fmt::format("{} counts for {} ranks", counts.size(), size()));
  for (const std::int64_t c : counts)
    if (c < 0) wrong(collective, fmt::format("negative count {}", c));
  // The lists agree when their hashes do.
  const auto hash = static_cast<std::int64_t>(XXH3_64bits(counts.data(), counts.size() * 8) >> 1);
  std::vector<std::int64_t> at(counts.size(), 0);
  for (std::size_t r = 0; r < counts.size(); ++r) {
    counts[r] *= size_of(dtype);
    if (r > 0) at[r] = at[r - 1] + counts[r - 1];
  }
  const double sent = (size() - 1.0) * static_cast<double>(counts[static_cast<std::size_t>(rank())]);
  const std::int64_t count = collective == Collective::all_gather ? counts[0] / size_of(dtype) : hash;
  return launch(call(collective, count, dtype), sent, [this, in, out, at = std::move(at), counts = std::move(counts)] {
    group_->all_gather(bytes_of(in), bytes_of(out), at, counts);
  });
}

Handle GroupCommunicator::all_gather(const void* in, void* out, std::int64_t count, DType dtype) {
  return gather(Collective::all_gather, in, out, std::vector<std::int64_t>(static_cast<std::size_t>(size()), count), dtype);
}

Handle GroupCommunicator::all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) {
  return gather(Collective::all_gather_v, in, out, {counts.begin(), counts.end()}, dtype);
}

Handle GroupCommunicator::exchange(Collective collective, const void* in, std::vector<std::int64_t> send_counts, void* out,
                                   std::vector<std::int64_t> receive_counts, DType dtype) {
  if (static_cast<int>(send_counts.size()) != size() || static_cast<int>(receive_counts.size()) != size())
    wrong(collective, fmt::format("{} and {} counts for {} ranks", send_counts.size(), receive_counts.size(), size()));
  for (auto* counts : {&send_counts, &receive_counts})
    for (std::int64_t& c : *counts) {
      if (c < 0) wrong(collective, fmt::format("negative count {}", c));
      c *= size_of(dtype);
    }
  const auto me = static_cast<std::size_t>(rank());
  if (send_counts[me] != receive_counts[me])
    wrong(collective, "what a rank sends to itself is not what it receives from itself");
  const double sent =
      static_cast<double>(std::accumulate(send_counts.begin(), send_counts.end(), std::int64_t{0}) - send_counts[me]);
  const std::int64_t count = collective == Collective::all_to_all ? send_counts[0] : 0;
  const auto offsets = [](const std::vector<std::int64_t>& bytes) {
    std::vector<std::int64_t> at(bytes.size(), 0);
    for (std::size_t i = 1; i < bytes.size(); ++i) at[i] = at[i - 1] + bytes[i - 1];
    return at;
  };
  return launch(call(collective, count, dtype), sent,
                [this, in, out, sa = offsets(send_counts), ra = offsets(receive_counts), s = std::move(send_counts),
                 r = std::move(receive_counts)] { group_->all_to_all(bytes_of(in), sa, s, bytes_of(out), ra, r); });
}

Handle GroupCommunicator::all_to_all(const void* in, void* out, std::int64_t count, DType dtype) {
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(size()), count);
  return exchange(Collective::all_to_all, in, counts, out, counts, dtype);
}

Handle GroupCommunicator::all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                                       std::span<const std::int64_t> receive_counts, DType dtype) {
  return exchange(Collective::all_to_all_v, in, {send_counts.begin(), send_counts.end()}, out,
                  {receive_counts.begin(), receive_counts.end()}, dtype);
}

Handle GroupCommunicator::broadcast(void* data, std::int64_t count, DType dtype, int root) {
  const std::int64_t bytes = count * size_of(dtype);
  return launch(call(Collective::broadcast, count, dtype, Reduction::sum, root),
                rank() == root ? static_cast<double>(bytes) : 0,
                [=, this] { group_->broadcast(bytes_of(data), bytes, root); });
}

Handle GroupCommunicator::send(const void* data, std::int64_t count, DType dtype, int to) {
  const std::int64_t bytes = count * size_of(dtype);
  if (count < 0) wrong(Collective::send, fmt::format("negative count {}", count));
  return launch_peer(Collective::send, to, static_cast<double>(bytes),
                     [=, this](std::uint64_t n) { group_->send(bytes_of(data), bytes, dtype, to, n); });
}

Handle GroupCommunicator::receive(void* data, std::int64_t count, DType dtype, int from) {
  const std::int64_t bytes = count * size_of(dtype);
  if (count < 0) wrong(Collective::receive, fmt::format("negative count {}", count));
  return launch_peer(Collective::receive, from, 0,
                     [=, this](std::uint64_t n) { group_->receive(bytes_of(data), bytes, dtype, from, n); });
}

void GroupCommunicator::barrier() {
  std::shared_ptr<Task> task;
  {
    const std::scoped_lock lock(mutex_);
    Descriptor numbered = call(Collective::barrier, 0, DType::u8);
    numbered.sequence = ++sequence_;
    task = lane_->prepare(Collective::barrier, timed(Collective::barrier, 0, [this, numbered] {
      group_->begin(numbered);
      group_->barrier();
    }));
  }
  task->wait();
}

}  // namespace capstan::comm
