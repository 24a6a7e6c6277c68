// Mesh: the check that all ranks mean the same layout, then communicators as they are asked for.
#include "mesh/mesh.h"

#include <capstan/error.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <thread>

namespace capstan {
namespace {

constexpr std::size_t name_bytes = 160;  // of a layout in words, where ranks tell each other theirs

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

/// "rank 3", "ranks 0 to 2, 5 and 12 more"
std::string rank_words(const std::vector<int>& ranks) {
  std::vector<std::string> runs;
  std::size_t told = 0;
  for (std::size_t i = 0; i < ranks.size() && runs.size() < 8;) {
    std::size_t k = i;
    while (k + 1 < ranks.size() && ranks[k + 1] == ranks[k] + 1) ++k;
    runs.push_back(k == i ? std::to_string(ranks[i]) : fmt::format("{} to {}", ranks[i], ranks[k]));
    told += k - i + 1;
    i = k + 1;
  }
  std::string text = fmt::format("{}{}", ranks.size() == 1 ? "rank " : "ranks ", fmt::join(runs, ", "));
  if (told < ranks.size()) text += fmt::format(" and {} more", ranks.size() - told);
  return text;
}

/// All ranks or none throw: what they compare is the same everywhere.
void compare_layouts(Communicator& comm, const MeshLayout& layout) {
  const auto size = static_cast<std::size_t>(comm.size());
  const auto mine = static_cast<std::int64_t>(layout.digest());
  std::vector<std::int64_t> digests(size);
  comm.all_gather(&mine, digests.data(), 1, DType::i64).wait();
  if (std::all_of(digests.begin(), digests.end(), [&](std::int64_t d) { return d == digests.front(); })) return;

  std::array<char, name_bytes> name{};
  const std::string words = fmt::format("{} [{:016x}]", layout.describe().substr(0, name_bytes - 24), layout.digest());
  std::memcpy(name.data(), words.data(), words.size());
  std::vector<char> names(size * name_bytes);
  comm.all_gather(name.data(), names.data(), name_bytes, DType::u8).wait();
  std::map<std::int64_t, std::vector<int>> by_digest;
  for (std::size_t r = 0; r < size; ++r) by_digest[digests[r]].push_back(static_cast<int>(r));
  // What most ranks mean comes first: the others are to be mended.
  std::vector<std::vector<int>> sides;
  for (auto& [digest, ranks] : by_digest) sides.push_back(ranks);
  std::stable_sort(sides.begin(), sides.end(),
                   [](const auto& a, const auto& b) { return a.size() != b.size() ? a.size() > b.size() : a < b; });
  std::string text;
  for (std::size_t i = 0; i < sides.size() && i < 8; ++i)
    text += fmt::format("{}{}: {}", i == 0 ? "" : "; ", rank_words(sides[i]),
                        &names[static_cast<std::size_t>(sides[i].front()) * name_bytes]);
  if (sides.size() > 8) text += fmt::format("; and {} other meshes", sides.size() - 8);
  fail(Fault::input, "mesh",
       "the ranks do not mean the same mesh: " + text + ". Start all ranks with the same recipe, overrides and build");
}

bool is_training_axis(std::string_view name) {
  constexpr std::array<std::string_view, 7> names{"pp", "replicate", "shard", "context", "tensor", "expert_shard", "expert"};
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

Mesh::Mesh(std::shared_ptr<World> world, MeshLayout layout) : world_(std::move(world)), layout_(std::move(layout)) {
  compare_layouts(host("world", "control"), layout_);
  if (layout_.world() != world_->size())
    fail(Fault::input, "mesh",
         fmt::format("a mesh of {} over a job of {} ranks: expected one that covers the job", layout_.describe(),
                     world_->size()));
}

Mesh::~Mesh() = default;

void Mesh::use_data_world(std::shared_ptr<World> data) {
  data_ = std::move(data);
  for (Made& m : made_) m.host = true;
}

Communicator& Mesh::made(const std::string& name, std::string_view lane, std::vector<int> ranks, bool host) {
  host = host && data_ != nullptr;
  for (const Made& m : made_)
    if (m.host == host && m.lane == lane && m.comm->ranks() == ranks) return *m.comm;
  // Two of one name and the same ranks would be hard to tell apart.
  const std::string full = fmt::format("{}/{}{}", name, lane, host ? " of hosts" : "");
  made_.push_back({host, std::string(lane), (host ? *world_ : data_world()).make(full, std::move(ranks))});
  return *made_.back().comm;
}

Communicator& Mesh::along(std::string_view axes, std::string_view lane, bool host) {
  if (axes == "world") return made("world", lane, all_ranks(world_->size()), host);
  std::vector<std::string_view> names;
  for (std::size_t from = 0; from <= axes.size();) {
    const std::size_t plus = std::min(axes.find('+', from), axes.size());
    names.push_back(axes.substr(from, plus - from));
    if (!layout_.has(names.back()) && !is_training_axis(names.back()))
      fail(Fault::programming, "mesh", fmt::format("a communicator along '{}': no axis is called '{}'", axes, names.back()));
    from = plus + 1;
  }
  return made(std::string(axes), lane, layout_.group(rank(), names), host);
}

Communicator& Mesh::replicas(int ways, std::string_view lane, bool host) {
  const int size = layout_.size("tensor");
  if (ways < 1 || size % ways != 0)
    fail(Fault::programming, "mesh",
         fmt::format("a cut {} ways over {} tensor ranks: expected a divisor of {}", ways, size, size));
  const std::vector<int> tensor = layout_.group(rank(), "tensor");
  const int length = size / ways, first = coordinate("tensor") / length * length;
  return made(fmt::format("tensor/{}", ways), lane, {tensor.begin() + first, tensor.begin() + first + length}, host);
}

Communicator& Mesh::comm(std::string_view axes, std::string_view lane) { return along(axes, lane, false); }
Communicator& Mesh::host(std::string_view axes, std::string_view lane) { return along(axes, lane, true); }
Communicator& Mesh::tensor_replicas(int ways, std::string_view lane) { return replicas(ways, lane, false); }
Communicator& Mesh::host_tensor_replicas(int ways, std::string_view lane) { return replicas(ways, lane, true); }

void Mesh::on_first_rank(const std::function<void()>& work) {
  if (world_->size() == 1) return work();
  struct Shared {
    std::function<void()> work;
    std::exception_ptr thrown;
    std::atomic<bool> over{false};
  };
  const auto shared = std::make_shared<Shared>();
  Communicator& all = host("world", "patience");
  std::thread worker;
  if (rank() == 0) {
    shared->work = work;
    worker = std::thread([shared] {
      try {
        shared->work();
      } catch (...) {
        shared->thrown = std::current_exception();
      }
      shared->over = true;
    });
  }
  try {
    for (std::int64_t over = 0;;) {
      over = shared->over;
      if (over != 0 && shared->thrown) break;  // the others hear of it as of any rank that failed
      all.all_reduce(&over, 1, DType::i64, Reduction::max).wait();
      if (over != 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  } catch (...) {
    if (worker.joinable()) worker.join();
    throw;
  }
  if (worker.joinable()) worker.join();
  if (shared->thrown) std::rethrow_exception(shared->thrown);
}

std::vector<Communicator*> Mesh::communicators() const {
  std::vector<Communicator*> all;
  for (const Made& m : made_) all.push_back(m.comm.get());
  return all;
}

}  // namespace capstan
