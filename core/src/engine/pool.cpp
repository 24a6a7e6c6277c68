#include "engine/pool.h"

#include <algorithm>
#include <string>

namespace capstan {

Pool::Pool(Device& device, std::int64_t bytes, std::shared_ptr<void> memory)
    : memory_(memory ? Tensor::wrap(memory.get(), Dims{bytes}, DType::u8, device, memory) : Tensor::empty(Dims{bytes}, DType::u8, device)) {}

std::optional<std::int64_t> Pool::take(std::int64_t bytes) {
  std::int64_t begin = 0;
  auto it = taken_.begin();
  for (; it != taken_.end() && it->begin - begin < bytes; ++it) begin = it->end;
  if (it == taken_.end() && memory_.bytes() - begin < bytes) return std::nullopt;
  taken_.insert(it, {begin, begin + bytes});
  return begin;
}

void Pool::give(std::int64_t offset) {
  const auto it = std::find_if(taken_.begin(), taken_.end(), [&](const Range& r) { return r.begin == offset; });
  if (it == taken_.end()) fail(Fault::programming, "pool", "offset " + std::to_string(offset) + " was not taken");
  taken_.erase(it);
}

void* Pool::at(std::int64_t offset) const {
  return memory_.is_meta() ? nullptr : static_cast<std::byte*>(memory_.raw()) + offset;
}

}  // namespace capstan
