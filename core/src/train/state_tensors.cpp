#include "train/state_tensors.h"

namespace capstan::train {

namespace {
Box box_of(const NamedTensor& t) { return {t.begin, {t.value.shape().begin(), t.value.shape().end()}}; }

bool elsewhere(const Tensor& t) { return t.device().kind() == DeviceKind::cuda; }

/// The tensor's memory, or room for it on the host.
void* place(const NamedTensor& t, std::size_t i, HostMemory& host) {
  if (!elsewhere(t.value)) return t.value.raw();
  host[i].resize(static_cast<std::size_t>(t.value.bytes()));
  return host[i].data();
}
}  // namespace

std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors, HostMemory& host) {
  host.assign(tensors.size(), {});
  std::vector<checkpoint::Wanted> all;
  for (const NamedTensor& t : tensors) all.push_back({t.name, t.value.dtype(), t.shape, box_of(t), place(t, all.size(), host)});
  return all;
}

void to_device(std::span<const NamedTensor> tensors, const HostMemory& host) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (elsewhere(tensors[i].value)) tensors[i].value.copy_from_host(host[i].data(), tensors[i].value.bytes());
}

std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors, HostMemory& host) {
  host.assign(tensors.size(), {});
  std::vector<SavedTensor> all;
  for (const NamedTensor& t : tensors) {
    SavedTensor s;
    s.name = t.name, s.dtype = t.value.dtype(), s.global_shape = t.shape, s.box = box_of(t);
    void* const data = place(t, all.size(), host);
    if (elsewhere(t.value)) t.value.copy_to_host(data, t.value.bytes());
    s.data = data, s.bytes = t.value.bytes();
    all.push_back(std::move(s));
  }
  return all;
}

checkpoint::FormatMaker format_maker(PluginHost& host) {
  return [&host](const std::string& name) { return host.make_as<CheckpointFormat>(host.choice("checkpoint", name, {})); };
}

}  // namespace capstan::train
