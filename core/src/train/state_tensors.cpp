#include "train/state_tensors.h"

namespace capstan::train {

namespace {
Box box_of(const NamedTensor& t) { return {t.begin, {t.value.shape().begin(), t.value.shape().end()}}; }
}  // namespace

std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors) {
  std::vector<checkpoint::Wanted> all;
  for (const NamedTensor& t : tensors) all.push_back({t.name, t.value.dtype(), t.shape, box_of(t), t.value.raw()});
  return all;
}

std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors) {
  std::vector<SavedTensor> all;
  for (const NamedTensor& t : tensors) {
    SavedTensor s;
    s.name = t.name, s.dtype = t.value.dtype(), s.global_shape = t.shape, s.box = box_of(t);
    s.data = t.value.raw(), s.bytes = t.value.bytes();
    all.push_back(std::move(s));
  }
  return all;
}

checkpoint::FormatMaker format_maker(PluginHost& host) {
  return [&host](const std::string& name) { return host.make_as<CheckpointFormat>(host.choice("checkpoint", name, {})); };
}

}  // namespace capstan::train
