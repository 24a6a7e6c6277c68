// Values and gradients between pipeline ranks: nothing blocks but wait().
#include "pipeline/transfers.h"

#include <algorithm>

namespace capstan::pipeline {

namespace {

constexpr std::size_t words = 3 + Dims::capacity;  // of one value's shape: present, element type, rank, extents

std::string text(const ValueShape& s) { return s.present ? std::string(name_of(s.dtype)) + " " + to_string(s.dims) : "nothing"; }

std::vector<std::int64_t> pack(const std::vector<ValueShape>& shapes) {
  std::vector<std::int64_t> header;
  for (const ValueShape& s : shapes) {
    header.push_back(s.present), header.push_back(static_cast<std::int64_t>(s.dtype)), header.push_back(s.dims.size());
    for (int i = 0; i < Dims::capacity; ++i) header.push_back(i < s.dims.size() ? s.dims[i] : 0);
  }
  return header;
}

std::vector<ValueShape> unpack(const std::vector<std::int64_t>& header) {
  std::vector<ValueShape> shapes(header.size() / words);
  for (std::size_t k = 0; k < shapes.size(); ++k) {
    const std::int64_t* at = header.data() + k * words;
    shapes[k].present = at[0] != 0, shapes[k].dtype = static_cast<DType>(at[1]);
    for (std::int64_t i = 0; i < at[2]; ++i) shapes[k].dims.push(at[3 + i]);
  }
  return shapes;
}

bool moves(const ValueShape& s) { return s.present && s.dims.product() > 0; }

}  // namespace

Geometry geometry(const ForwardContext& context) {
  Geometry g{context.grad};
  for (const Space& s : context.batch.spaces) g.push_back(s.capacity), g.push_back(s.sequences());
  return g;
}

void Transfers::send_values(int to, int stage, const Geometry& geometry, const std::vector<std::string>& names, const std::vector<Tensor>& values) {
  std::vector<ValueShape> shapes;
  for (const Tensor& t : values) shapes.push_back(t.defined() ? ValueShape{true, t.dtype(), t.shape()} : ValueShape{});
  Sent sent;
  const auto [it, fresh] = known_.try_emplace({stage, geometry}, shapes);
  if (fresh && !shapes.empty()) {
    sent.header = std::make_shared<std::vector<std::int64_t>>(pack(shapes));
    sent.handles.push_back(hosts_.send(sent.header->data(), static_cast<std::int64_t>(sent.header->size()), DType::i64, to));
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!(shapes[i] == it->second[i]))
      fail(Fault::programming, "pipeline", "the carried value '" + names[i] + "' between stages " + std::to_string(stage) + " and " + std::to_string(stage + 1) +
                                               " is " + text(shapes[i]) + ", but " + text(it->second[i]) +
                                               " for an earlier batch of as many rows and sequences: its shape must follow from those");
    if (!moves(shapes[i])) continue;
    sent.values.push_back(values[i].contiguous());
    sent.handles.push_back(pp_.send(sent.values.back().raw(), values[i].numel(), values[i].dtype(), to));
  }
  sent_.push_back(std::move(sent));
}

void Transfers::send_gradients(int to, const std::vector<Tensor>& gradients) {
  Sent sent;
  for (const Tensor& g : gradients) {
    if (!g.defined() || g.numel() == 0) continue;
    sent.values.push_back(g.contiguous());
    sent.handles.push_back(pp_.send(sent.values.back().raw(), g.numel(), g.dtype(), to));
  }
  sent_.push_back(std::move(sent));
}

std::shared_ptr<Packet> Transfers::receive_values(int from, int stage, const Geometry& geometry, std::size_t count) {
  Waiting w;
  w.packet = std::make_shared<Packet>();
  w.stage = stage, w.geometry = geometry, w.count = count;
  const bool unknown = known_.find({stage, geometry}) == known_.end();
  if (unknown && count > 0 && asked_.try_emplace({stage, geometry}, true).second) w.header.resize(count * words);
  const std::shared_ptr<Packet> packet = w.packet;
  post(from, std::move(w));
  return packet;
}

std::shared_ptr<Packet> Transfers::receive_gradients(int from, const std::vector<ValueShape>& shapes) {
  Waiting w;
  w.packet = std::make_shared<Packet>();
  for (ValueShape s : shapes) {
    s.present = s.has_gradient();
    w.packet->shapes.push_back(s);
  }
  const std::shared_ptr<Packet> packet = w.packet;
  post(from, std::move(w));
  return packet;
}

void Transfers::post(int from, Waiting waiting) {
  waiting_[from].push_back(std::move(waiting));
  advance(from, nullptr);
}

void Transfers::advance(int from, const Packet* until) {
  std::deque<Waiting>& queue = waiting_[from];
  while (!queue.empty()) {
    Waiting& w = queue.front();
    if (!w.header.empty()) {
      if (!w.header_asked) {
        w.header_handle = hosts_.receive(w.header.data(), static_cast<std::int64_t>(w.header.size()), DType::i64, from);
        w.header_asked = true;
      }
      if (until == nullptr && !w.header_handle.done()) return;
      w.header_handle.wait();
      known_[{w.stage, w.geometry}] = unpack(w.header);
      asked_.erase({w.stage, w.geometry});
    }
    if (w.stage >= 0 && w.count > 0) w.packet->shapes = known_.at({w.stage, w.geometry});
    for (const ValueShape& s : w.packet->shapes) {
      Tensor& t = w.packet->values.emplace_back();
      if (!s.present) continue;
      t = Tensor::empty(s.dims, s.dtype, device_);
      if (moves(s)) w.packet->handles.push_back(pp_.receive(t.raw(), t.numel(), s.dtype, from));
    }
    const bool last = w.packet.get() == until;
    queue.pop_front();
    if (last) return;
  }
}

void Transfers::wait(int from, Packet& packet) {
  const auto& queue = waiting_[from];
  if (std::any_of(queue.begin(), queue.end(), [&](const Waiting& w) { return w.packet.get() == &packet; })) advance(from, &packet);
  for (Handle& h : packet.handles) h.wait();
  packet.handles.clear();
}

void Transfers::progress() {
  for (auto& [from, queue] : waiting_)
    if (!queue.empty()) advance(from, nullptr);
  while (!sent_.empty() && std::all_of(sent_.front().handles.begin(), sent_.front().handles.end(), [](const Handle& h) { return h.done(); })) {
    for (Handle& h : sent_.front().handles) h.wait();
    sent_.pop_front();
  }
}

void Transfers::finish() {
  for (Sent& s : sent_)
    for (Handle& h : s.handles) h.wait();
  sent_.clear();
}

}  // namespace capstan::pipeline
