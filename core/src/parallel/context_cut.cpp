// The head-tail cut of sequences over context ranks.
#include "parallel/context_cut.h"

#include "parallel/rows.h"

#include <capstan/error.h>
#include <kernels/backend.h>

#include <algorithm>
#include <string>

namespace capstan {

std::vector<std::int32_t> ContextCut::source() const {
  std::vector<std::int32_t> rows(static_cast<std::size_t>(capacity), -1);
  for (const Chunk& c : chunks)
    if (c.rank == rank)
      for (std::int32_t i = 0; i < c.length; ++i) rows[static_cast<std::size_t>(c.local + i)] = c.whole + i;
  return rows;
}

namespace parallel {

namespace {

constexpr std::int64_t step = 64;  // of capacities that exceed an even share: few plans for many batches

/// Where this rank's rows are in the whole batch, one past its end for rows that are dead.
Tensor places_of(const ContextCut& cut, std::int64_t whole, Device& device) {
  std::vector<std::int32_t> rows = cut.source();
  for (std::int32_t& row : rows)
    if (row < 0) row = static_cast<std::int32_t>(whole);
  return Tensor::of<std::int32_t>(rows, Dims{cut.capacity}, device);
}

/// Taken on the device: the host does not wait for what is queued there.
Tensor picked(const ContextCut& cut, const Tensor& places, const std::string& name, const Tensor& whole) {
  if (whole.rank() != 1)
    fail(Fault::programming, "context",
         "stream '" + name + "': expected one value a row to cut it over the context axis, got shape " +
             to_string(whole.shape()));
  if (whole.is_meta()) return Tensor::empty(Dims{cut.capacity}, whole.dtype(), whole.device());
  if (whole.dtype() != DType::i32 && whole.dtype() != DType::i64 && whole.dtype() != DType::f32 && whole.dtype() != DType::f64)
    fail(Fault::programming, "context",
         "stream '" + name + "': expected i32, i64, f32 or f64 to cut it over the context axis, got " +
             std::string(name_of(whole.dtype())));
  const std::int64_t n = whole.numel();
  const Tensor rows = Tensor::empty(Dims{n + 1}, whole.dtype(), whole.device()), mine = Tensor::empty(Dims{cut.capacity}, whole.dtype(), whole.device());
  rows.narrow(0, 0, n).copy_from(whole);
  rows.narrow(0, n, 1).fill(name == "targets" ? -1 : 0);
  whole.device().backend().gather_rows(cut.capacity, size_of(whole.dtype()), rows.raw(), n + 1, places.data<std::int32_t>(), mine.raw());
  return mine;
}

}  // namespace

std::shared_ptr<const ContextCut> cut_sequences(std::span<const std::int32_t> starts, std::int64_t capacity, int size,
                                                int rank, int tensor_ranks) {
  if (size < 1 || rank < 0 || rank >= size || starts.empty())
    fail(Fault::programming, "context",
         "rank " + std::to_string(rank) + " of " + std::to_string(size) + " over " + std::to_string(starts.size()) +
             " starts");
  auto cut = std::make_shared<ContextCut>();
  cut->size = size, cut->rank = rank;
  cut->starts.assign(starts.begin(), starts.end());
  std::vector<std::int32_t> used(static_cast<std::size_t>(size), 0);
  cut->local_starts.push_back(0);
  const std::int64_t pieces = 2 * size;
  for (std::size_t s = 0; s + 1 < starts.size(); ++s) {
    const std::int64_t length = starts[s + 1] - starts[s];
    // Where rounding makes a chunk longer turns with the sequence: many short ones burden no rank more than others.
    const auto edge = [&](std::int64_t i) {
      return static_cast<std::int32_t>((i * length + static_cast<std::int64_t>(s) % pieces) / pieces);
    };
    for (std::int64_t i = 0; i < pieces; ++i) {
      const std::int32_t from = edge(i), n = edge(i + 1) - from;
      if (n == 0) continue;
      const int holder = static_cast<int>(std::min(i, pieces - 1 - i));
      std::int32_t& at = used[static_cast<std::size_t>(holder)];
      cut->chunks.push_back({holder, static_cast<std::int32_t>(s), from, at, starts[s] + from, n});
      at += n;
    }
    cut->local_starts.push_back(used[static_cast<std::size_t>(rank)]);
  }
  const std::int64_t most = *std::max_element(used.begin(), used.end()), share = (capacity + size - 1) / size;
  cut->capacity = padded_rows(most <= share ? share : (most + step - 1) / step * step, tensor_ranks);
  return cut;
}

Batch cut_context(const Batch& whole, int size, int rank, int tensor_ranks) {
  if (size == 1) return pad_rows(whole, tensor_ranks);
  if (whole.spaces.size() != 1)
    fail(Fault::input, "context",
         "batches of " + std::to_string(whole.spaces.size()) +
             " token spaces cannot be cut over the context axis: expected one; train with context: 1");
  const Space& space = whole.spaces[0];
  const auto cut = cut_sequences(space.host_starts, space.capacity, size, rank, tensor_ranks);
  Batch local;
  local.step_weight = whole.step_weight;
  Space& to = local.spaces.emplace_back(space);
  to.cut = cut;
  to.capacity = cut->capacity;
  to.host_starts = cut->local_starts;
  to.starts = Tensor::of<std::int32_t>(to.host_starts, Dims{static_cast<std::int64_t>(to.host_starts.size())},
                                       space.starts.device());
  const Tensor places = places_of(*cut, space.capacity, space.starts.device());
  to.positions = picked(*cut, places, "positions", space.positions);
  to.sample_ids = picked(*cut, places, "sample_ids", space.sample_ids);
  for (const auto& [name, value] : whole.streams()) local.set(name, picked(*cut, places, name, value));
  return local;
}

}  // namespace parallel
}  // namespace capstan
