// Communicators of one rank, and what all communicators share.
#include "comm/communicator.h"
#include "comm/gpu_world.h"
#include "comm/shared_world.h"

#include <capstan/error.h>
#include <kernels/backend.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace capstan {

Communicator::~Communicator() = default;
void Communicator::adopt(std::shared_ptr<void>, std::size_t) {}
World::~World() = default;
std::string World::cannot_record() const { return "hosts wait in each collective between ranks whose GPUs reach each other through host memory (mesh.gpu_communication)"; }

std::shared_ptr<void> World::shared_memory(std::size_t bytes) {
  const std::size_t page = 4096;
  void* p = std::aligned_alloc(page, std::max(page, (bytes + page - 1) / page * page));
  if (!p) fail(Fault::runtime, "communicator", "no memory for a buffer of " + std::to_string(bytes) + " bytes");
  return {p, std::free};
}

void Handle::drop() noexcept {
  try {
    wait();
  } catch (...) {
    // Every later collective of the job throws the same failure.
  }
}

std::vector<CommRecord> Communicator::ledger() const {
  const std::scoped_lock lock(ledger_mutex_);
  return ledger_;
}

void Communicator::clear_ledger() {
  const std::scoped_lock lock(ledger_mutex_);
  ledger_.clear();
}

void Communicator::record(std::string_view collective, std::int64_t calls, double bytes, double seconds, double waited) {
  const std::scoped_lock lock(ledger_mutex_);
  CommRecord* row = nullptr;
  for (CommRecord& r : ledger_)
    if (r.collective == collective) row = &r;
  if (!row) {
    row = &ledger_.emplace_back();
    row->collective = collective;
  }
  row->calls += calls;
  row->bytes += bytes;
  row->seconds += seconds;
  row->waited += waited;
}

namespace comm {
namespace {

/// Data is the host's memory, or with a device that device's.
class Solo final : public Communicator {
 public:
  Solo(std::string name, std::vector<int> ranks, std::shared_ptr<Device> device)
      : Communicator(std::move(name), std::move(ranks), 0), device_(std::move(device)) {}
  Handle all_reduce(void*, std::int64_t, DType, Reduction) override { return {}; }
  Handle reduce_scatter(const void* in, void* out, std::int64_t count, DType dtype, Reduction) override {
    return copy(in, out, count, dtype);
  }
  Handle all_gather(const void* in, void* out, std::int64_t count, DType dtype) override {
    return copy(in, out, count, dtype);
  }
  Handle all_gather_v(const void* in, void* out, std::span<const std::int64_t> counts, DType dtype) override {
    return copy(in, out, one(counts), dtype);
  }
  Handle all_to_all(const void* in, void* out, std::int64_t count, DType dtype) override {
    return copy(in, out, count, dtype);
  }
  Handle all_to_all_v(const void* in, std::span<const std::int64_t> send_counts, void* out,
                      std::span<const std::int64_t> receive_counts, DType dtype) override {
    if (one(send_counts) != one(receive_counts)) wrong("sends and receives of a rank with itself must agree");
    return copy(in, out, one(send_counts), dtype);
  }
  Handle broadcast(void*, std::int64_t, DType, int root) override {
    if (root != 0) wrong("the root must be 0");
    return {};
  }
  Handle send(const void*, std::int64_t, DType, int) override { wrong("there is nobody to send to"); }
  Handle receive(void*, std::int64_t, DType, int) override { wrong("there is nobody to receive from"); }
  void barrier() override {
    if (device_) device_->synchronize();
  }

 private:
  [[noreturn]] void wrong(const std::string& what) const {
    fail(Fault::programming, "communicator '" + name() + "'", "a group of one: " + what);
  }
  std::int64_t one(std::span<const std::int64_t> counts) const {
    if (counts.size() != 1) wrong("expected one count, got " + std::to_string(counts.size()));
    return counts[0];
  }
  Handle copy(const void* in, void* out, std::int64_t count, DType dtype) const {
    if (count < 0) wrong("negative count " + std::to_string(count));
    if (in == out || count == 0) return {};
    if (!device_) {
      std::memmove(out, in, static_cast<std::size_t>(count * size_of(dtype)));
      return {};
    }
    kernels::Strided bytes;
    bytes.rank = 1, bytes.shape[0] = count * size_of(dtype), bytes.to[0] = bytes.from[0] = 1;
    device_->backend().copy(bytes, kernels::Num::u8, out, kernels::Num::u8, in);
    return {};
  }
  std::shared_ptr<Device> device_;
};

}  // namespace

std::shared_ptr<Communicator> make_solo(std::string name, std::vector<int> ranks) {
  return std::make_shared<Solo>(std::move(name), std::move(ranks), nullptr);
}

std::shared_ptr<Communicator> make_gpu_solo(std::string name, std::vector<int> ranks, std::shared_ptr<Device> device) {
  return std::make_shared<Solo>(std::move(name), std::move(ranks), std::move(device));
}

}  // namespace comm
}  // namespace capstan
