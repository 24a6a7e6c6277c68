#include "train/state_tensors.h"

#include "train/machine.h"

namespace capstan::train {

namespace {
Box box_of(const NamedTensor& t) { return {t.begin, {t.value.shape().begin(), t.value.shape().end()}}; }

bool elsewhere(const Tensor& t) { return t.device().kind() == DeviceKind::cuda; }
}  // namespace

std::vector<checkpoint::Wanted> wanted_tensors(std::span<const NamedTensor> tensors, std::optional<DType> stored) {
  std::vector<checkpoint::Wanted> all;
  std::shared_ptr<Device> host;  // of what is on its way to a GPU
  for (const NamedTensor& t : tensors) {
    const Tensor& value = t.value;
    checkpoint::Wanted w{t.name, stored.value_or(value.dtype()), t.shape, box_of(t)};
    if (!elsewhere(value) && w.dtype == value.dtype()) {
      w.target = value.raw();
    } else {
      if (elsewhere(value) && !host) host = make_cpu_device(thread_count(value.device()));
      w.take = [value, dtype = w.dtype, from = elsewhere(value) ? host : value.device().shared_from_this()](void* data) {
        value.copy_from(Tensor::wrap(data, value.shape(), dtype, *from, nullptr));
      };
    }
    all.push_back(std::move(w));
  }
  return all;
}

std::vector<SavedTensor> saved_tensors(std::span<const NamedTensor> tensors, HostMemory& host) {
  host.assign(tensors.size(), {});
  std::vector<SavedTensor> all;
  for (const NamedTensor& t : tensors) {
    SavedTensor s;
    s.name = t.name, s.dtype = t.value.dtype(), s.global_shape = t.shape, s.box = box_of(t);
    s.data = t.value.raw(), s.bytes = t.value.bytes();
    if (elsewhere(t.value)) {
      std::vector<std::byte>& copy = host[all.size()];
      copy.resize(static_cast<std::size_t>(s.bytes));
      t.value.copy_to_host(copy.data(), s.bytes);
      s.data = copy.data();
    }
    all.push_back(std::move(s));
  }
  return all;
}

checkpoint::FormatMaker format_maker(PluginHost& host) {
  return [&host](const std::string& name) { return host.make_as<CheckpointFormat>(host.choice("checkpoint", name, {})); };
}

}  // namespace capstan::train
