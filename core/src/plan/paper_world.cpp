// A world without other ranks, for planning.
#include "plan/paper_world.h"

#include <capstan/error.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

namespace capstan::plan {

namespace {

class PaperCommunicator final : public Communicator {
 public:
  PaperCommunicator(std::string name, std::vector<int> ranks, int rank) : Communicator(std::move(name), std::move(ranks), rank) {}

  Handle all_reduce(void*, std::int64_t, DType, Reduction) override { return {}; }
  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction) override {
    copy(out, in == nullptr ? nullptr : static_cast<const char*>(in) + rank() * count * size_of(dtype), count, dtype);
    return {};
  }
  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    for (int r = 0; r < size(); ++r) copy(at(out, r * count, dtype), in, count, dtype);
    return {};
  }
  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    const std::int64_t mine = counts[static_cast<std::size_t>(rank())];
    const std::int64_t begin = std::accumulate(counts.begin(), counts.begin() + rank(), std::int64_t{0});
    copy(at(out, begin, dtype), in, mine, dtype);
    return {};
  }
  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override {
    copy(out, in, count * size(), dtype);
    return {};
  }
  Handle all_to_all_v(const void*, std::span<const std::int64_t>, void*, std::span<const std::int64_t>, DType) override { return {}; }
  Handle broadcast(void*, std::int64_t, DType, int) override { return {}; }
  Handle send(const void*, std::int64_t, DType, int) override { return {}; }
  Handle receive(void*, std::int64_t, DType, int) override { return {}; }
  void barrier() override {}

 private:
  static void* at(void* data, std::int64_t element, DType dtype) { return data == nullptr ? nullptr : static_cast<char*>(data) + element * size_of(dtype); }
  static void copy(void* to, const void* from, std::int64_t count, DType dtype) {
    if (to != nullptr && from != nullptr && to != from) std::memmove(to, from, static_cast<std::size_t>(count * size_of(dtype)));
  }
};

class PaperWorld final : public World {
 public:
  PaperWorld(int rank, int size, int per_host) : rank_(rank), size_(size), per_host_(per_host) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return rank_ % per_host_; }
  int local_size() const override { return std::min(per_host_, size_); }
  std::string_view backend() const override { return "paper"; }
  std::shared_ptr<Communicator> make(std::string name, std::vector<int> ranks) override {
    const auto mine = std::find(ranks.begin(), ranks.end(), rank_);
    if (mine == ranks.end()) fail(Fault::programming, name, "rank " + std::to_string(rank_) + " is not in the group that it makes");
    const int index = static_cast<int>(mine - ranks.begin());
    return std::make_shared<PaperCommunicator>(std::move(name), std::move(ranks), index);
  }
  void at(std::int64_t, std::string_view) override {}
  bool fail_job(const std::string&) noexcept override { return true; }
  [[noreturn]] void end_failed(int) override { fail(Fault::programming, "plan", "a job on paper has no process to end"); }
  double timeout() const override { return std::numeric_limits<double>::infinity(); }

 private:
  int rank_, size_, per_host_;
};

}  // namespace

std::shared_ptr<World> make_paper_world(int rank, int size, int per_host) { return std::make_shared<PaperWorld>(rank, size, per_host); }

}  // namespace capstan::plan
