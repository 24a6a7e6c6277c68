#include "train/state_tensors.h"

namespace capstan::train {

namespace {
std::vector<std::int64_t> extents(const Tensor& t) { return {t.shape().begin(), t.shape().end()}; }
Box whole(const Tensor& t) { return {std::vector<std::int64_t>(static_cast<std::size_t>(t.rank()), 0), extents(t)}; }
}  // namespace

std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors) {
  std::vector<checkpoint::Wanted> all;
  for (const NamedTensor& t : tensors) all.push_back({t.name, t.value.dtype(), extents(t.value), whole(t.value), t.value.raw()});
  return all;
}

std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors) {
  std::vector<SavedTensor> all;
  for (const NamedTensor& t : tensors) {
    SavedTensor s;
    s.name = t.name, s.dtype = t.value.dtype(), s.global_shape = extents(t.value), s.box = whole(t.value);
    s.data = t.value.raw(), s.bytes = t.value.bytes();
    all.push_back(std::move(s));
  }
  return all;
}

checkpoint::FormatMaker format_maker(PluginHost& host) {
  return [&host](const std::string& name) { return host.make_as<CheckpointFormat>(host.choice("checkpoint", name, {})); };
}

}  // namespace capstan::train
