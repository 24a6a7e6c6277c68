// The snapshot copy. Threads of its own, not OpenMP's: the trainer's team keeps its binding and its size.
#include "checkpoint/staging.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>

namespace capstan::checkpoint {
namespace {

constexpr std::int64_t page = 4096;
constexpr std::int64_t worth_a_thread = 8 * 1024 * 1024;  // bytes; below it starting a thread costs more

std::int64_t rounded(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

/// Runs part(begin, end) over [0, total) in `threads` equal, page-aligned parts.
template <class Part>
void in_parallel(int threads, std::int64_t total, const Part& part) {
  const auto count = std::clamp<std::int64_t>(total / worth_a_thread, 1, threads);
  const auto share = (total / count + page - 1) / page * page;
  std::vector<std::jthread> others;
  for (std::int64_t i = 1; i < count; ++i) {
    others.emplace_back([&part, i, share, total] { part(std::min(i * share, total), std::min((i + 1) * share, total)); });
  }
  part(std::int64_t{0}, std::min(share, total));
}

}  // namespace

Staging::Staging(int threads) : threads_(std::max(threads, 1)) {}
Staging::~Staging() { release(); }

void Staging::release() {
  if (data_ != nullptr) ::munmap(data_, static_cast<std::size_t>(bytes_));
  data_ = nullptr, bytes_ = 0;
}

void Staging::reserve(std::span<const std::int64_t> bytes) {
  std::int64_t total = 0;
  for (const std::int64_t b : bytes) total += rounded(b);
  grow(total);
}

void Staging::grow(std::int64_t bytes) {
  if (bytes <= bytes_) return;
  release();
  bytes = (bytes + page - 1) / page * page;
  void* memory =
      ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    fail(Fault::runtime, "checkpoint",
         "no memory for a snapshot of " + std::to_string(bytes) + " bytes: " + std::strerror(errno) +
             "; set checkpoint.asynchronous: false, which needs none");
  }
  data_ = static_cast<char*>(memory), bytes_ = bytes;
  (void)::madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  in_parallel(threads_, bytes, [this](std::int64_t begin, std::int64_t end) {
    for (auto i = begin; i < end; i += page) *static_cast<volatile char*>(data_ + i) = 0;
  });
}

void Staging::copy(std::vector<SavedTensor>& tensors) {
  std::vector<std::int64_t> places;
  std::int64_t total = 0;
  for (const auto& t : tensors) places.push_back(total), total += rounded(t.bytes);
  grow(total);
  in_parallel(threads_, total, [&](std::int64_t begin, std::int64_t end) {
    // The tensors that lie in this part, each in the longest run: glibc streams past the caches only then.
    auto i = static_cast<std::size_t>(std::upper_bound(places.begin(), places.end(), begin) - places.begin());
    if (i > 0) --i;
    for (; i < tensors.size() && places[i] < end; ++i) {
      const auto from = std::max(begin, places[i]), to = std::min(end, places[i] + tensors[i].bytes);
      if (from < to) {
        std::memcpy(data_ + from, static_cast<const char*>(tensors[i].data) + (from - places[i]),
                    static_cast<std::size_t>(to - from));
      }
    }
  });
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].data = data_ + places[i];
}

}  // namespace capstan::checkpoint
