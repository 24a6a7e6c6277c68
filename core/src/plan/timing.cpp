// From a call's ledger to seconds: each record by its kind.
#include "plan/timing.h"

#include <algorithm>
#include <string_view>

namespace capstan::plan {

namespace {

bool starts(const std::string& name, std::string_view with) { return std::string_view(name).starts_with(with); }
bool ends(const std::string& name, std::string_view with) { return std::string_view(name).ends_with(with); }

enum class Kind : std::uint8_t { product, attention, communication, other };

Kind kind_of(const OpRecord& r) {
  if (r.cost.comm > 0) return Kind::communication;
  if (starts(r.name, "linear fp8")) return Kind::product;
  if (r.name == "linear" || r.name == "linear dx" || r.name == "linear dw") return Kind::product;
  if (r.name == "head logits" || r.name == "head dx" || r.name == "head dw") return Kind::product;
  if (r.name == "attention" || r.name == "attention dx") return Kind::attention;
  return Kind::other;
}

double product_seconds(const OpRecord& r, const CallProfile& call, const Profile& profile, DType dtype, const DeviceModel& device, bool f8) {
  // A record sums the products of one call; their shapes are those of its matrices.
  const bool head = starts(r.name, "head");
  const double chunks = head ? std::max<double>(1, static_cast<double>(r.calls)) : 1;
  const double rows = profile.rows / chunks, wide = static_cast<double>(size_of(dtype));
  double seconds = 0, flop = 0;
  for (const Matrix& w : call.matrices) {
    Product p{rows, w.out, w.in};
    double bytes = wide * (rows * w.in + w.out * w.in + rows * w.out);
    if (ends(r.name, "dx")) p = {rows, w.in, w.out};
    if (ends(r.name, "dw")) p = {w.out, w.in, rows}, bytes = wide * (rows * w.in + rows * w.out) + 4 * w.out * w.in;
    const bool own = starts(r.name, "linear fp8") && device.peak_f8 > 0, narrow = (f8 && !head) || own;  // without fp8 it is emulated
    seconds += chunks * device.product(p, narrow ? DType::f8e4m3 : dtype, bytes);
    // 8 bits: both factors are read for their largest element, read again and written. Ours has a record of its own.
    if (narrow && !own) seconds += device.streaming(0, (2 * wide + 1) * (p.m * p.k + p.n * p.k), 4);
    flop += 2 * chunks * p.m * p.n * p.k;
  }
  return flop > 0 ? seconds * r.cost.flop / flop : device.streaming(0, r.cost.read + r.cost.write, static_cast<double>(r.calls)) + r.cost.flop / (0.7 * device.peak(dtype));
}

}  // namespace

std::optional<InnerTraffic> inner_traffic(const OpRecord& r) {
  if (r.cost.comm <= 0) return std::nullopt;
  InnerTraffic t;
  const bool context = r.name.find("sequences") != std::string::npos;
  t.axes = context ? "context" : "tensor", t.what = context ? "keys and values" : "rows";
  // The transpose of a gather is a scatter.
  const bool scatter = r.name.find("scatter") != std::string::npos;
  t.collective = scatter != ends(r.name, "dx") ? Collective::reduce_scatter : Collective::all_gather;
  t.calls = static_cast<double>(r.calls), t.bytes = r.cost.comm;
  return t;
}

double flop_of(const std::vector<OpRecord>& records) {
  double flop = 0;
  for (const OpRecord& r : records)
    if (kind_of(r) != Kind::communication) flop += r.cost.flop;
  return flop;
}

CallTimes call_times(const CallProfile& call, const Profile& profile, const Setting& setting, const DeviceModel& device, const Assumptions& assumptions) {
  const DType dtype = setting.engine.compute;
  CallTimes times;
  double products = 0, attention = 0, others = 0;  // of the forward
  const auto add = [&](const OpRecord& r, bool backward) {
    const double calls = static_cast<double>(r.calls);
    double seconds = 0;
    switch (kind_of(r)) {
      case Kind::communication: {
        const auto t = inner_traffic(r);
        const int size = setting.layout.size(t->axes);
        const double bytes = t->bytes / calls * size / (size - 1);  // of the whole buffer
        (backward ? times.backward_wait : times.forward_wait) += calls * device.collective(t->collective, bytes, group_shape(setting.layout, t->axes, device.per_host));
        return;
      }
      case Kind::product:
        seconds = product_seconds(r, call, profile, dtype, device, assumptions.f8_products);
        if (ends(r.name, "dw")) times.weight += seconds;
        break;
      case Kind::attention:
        seconds = device.attention(r.cost.flop, profile.length, profile.head_size, ends(r.name, "dx"), dtype) / assumptions.attention_rate;
        break;
      case Kind::other:
        seconds = device.streaming(r.cost.flop, r.cost.read + r.cost.write, calls);
        break;
    }
    (backward ? times.backward : times.forward) += seconds;
    if (backward) return;
    switch (kind_of(r)) {
      case Kind::product: products += seconds; break;
      case Kind::attention: attention += seconds; break;
      default: others += seconds;
    }
  };
  for (const OpRecord& r : call.forward) add(r, false);
  for (const OpRecord& r : call.backward) add(r, true);
  if (assumptions.repeated && !call.head)
    times.backward += assumptions.repeated->products * products + assumptions.repeated->attention * attention + assumptions.repeated->others * others;
  if (assumptions.overlap_tensor) {
    // Beside the products that they feed; what compute cannot hide stays.
    const auto hide = [&](double& compute, double& wait) {
      const double hidden = std::min(wait, compute);
      compute += hidden * (device.slowdown() - 1), wait -= hidden;
    };
    hide(times.forward, times.forward_wait);
    hide(times.backward, times.backward_wait);
  }
  return times;
}

}  // namespace capstan::plan
