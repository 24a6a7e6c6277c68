#include <capstan/batch.h>

#include <algorithm>

namespace capstan {

const Space& Batch::space(std::string_view name) const {
  for (const Space& s : spaces)
    if (s.name == name) return s;
  fail(Fault::programming, "batch", "no token space '" + std::string(name) + "'");
}

const Tensor& Batch::stream(std::string_view name) const {
  for (const auto& [n, t] : streams_)
    if (n == name) return t;
  std::string known;
  for (const auto& [n, t] : streams_) known += (known.empty() ? "" : ", ") + n;
  fail(Fault::programming, "batch", "no stream '" + std::string(name) + "': there is " + (known.empty() ? "none" : known));
}

bool Batch::has(std::string_view name) const {
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& s) { return s.first == name; });
}

void Batch::set(std::string name, Tensor value) {
  for (auto& [n, t] : streams_)
    if (n == name) {
      t = std::move(value);
      return;
    }
  streams_.emplace_back(std::move(name), std::move(value));
}

Batch make_batch(Device& device, std::span<const std::int32_t> tokens, std::span<const std::int32_t> lengths,
                 std::span<const std::int32_t> targets, std::span<const float> weight, std::int64_t first_token_id) {
  const std::int64_t rows = static_cast<std::int64_t>(tokens.size());
  Space space;
  space.capacity = rows;
  space.host_starts.push_back(0);
  std::vector<std::int32_t> positions(tokens.size());
  std::vector<std::int64_t> ids(tokens.size());
  for (std::int32_t length : lengths) {
    const std::int32_t begin = space.host_starts.back();
    if (length < 0 || begin + length > rows)
      fail(Fault::programming, "batch", "sequence lengths add up to more than the " + std::to_string(rows) + " tokens given");
    for (std::int32_t i = 0; i < length; ++i) positions[static_cast<std::size_t>(begin + i)] = i;
    space.host_starts.push_back(begin + length);
    space.past.push_back(0);
    space.longest = std::max<std::int64_t>(space.longest, length);
  }
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = first_token_id + static_cast<std::int64_t>(i);
  space.starts = Tensor::of<std::int32_t>(space.host_starts, Dims{static_cast<std::int64_t>(space.host_starts.size())}, device);
  space.positions = Tensor::of<std::int32_t>(positions, Dims{rows}, device);
  space.sample_ids = Tensor::of<std::int64_t>(ids, Dims{rows}, device);
  Batch batch;
  batch.spaces.push_back(std::move(space));
  batch.set("tokens", Tensor::of<std::int32_t>(tokens, Dims{rows}, device));
  if (!targets.empty()) {
    batch.set("targets", Tensor::of<std::int32_t>(targets, Dims{rows}, device));
    std::vector<float> w(weight.begin(), weight.end());
    if (w.empty())
      for (std::int32_t t : targets) w.push_back(t >= 0 ? 1.f : 0.f);
    for (float x : w) batch.step_weight += static_cast<double>(x);
    batch.own_weight = batch.step_weight;
    batch.set("weight", Tensor::of<float>(w, Dims{rows}, device));
  }
  return batch;
}

}  // namespace capstan
