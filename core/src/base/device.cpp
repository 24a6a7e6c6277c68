// Device: accounting and the op ledger.
#include <capstan/device.h>
#include <capstan/error.h>
#include <kernels/backend.h>

#include <chrono>

namespace capstan {

namespace {
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

Device::~Device() = default;

std::string_view Device::name() const {
  switch (kind()) {
    case DeviceKind::meta: return "meta";
    case DeviceKind::cpu: return "cpu";
    case DeviceKind::cuda: return "cuda";
  }
  return "?";
}

kernels::cpu::Context& Device::cpu() { fail(Fault::programming, "device", "host threads asked of a " + std::string(name()) + " device"); }

kernels::Backend& Device::backend() { fail(Fault::programming, "device", "kernels asked of a " + std::string(name()) + " device"); }

void Device::synchronize() {
  if (kind() != DeviceKind::meta) backend().synchronize();
}

std::string Device::describe() const { return std::string(name()); }

Cost Device::total_cost() const {
  Cost total;
  for (const OpRecord& r : ledger_) total += r.cost;
  return total;
}

void Device::log_op(std::string_view name, const Cost& cost, double seconds) {
  for (OpRecord& r : ledger_) {
    if (r.name == name) {
      ++r.calls, r.cost += cost, r.seconds += seconds;
      return;
    }
  }
  ledger_.push_back({std::string(name), 1, cost, seconds});
}

OpScope::OpScope(Device& device, std::string_view name, Cost cost)
    : device_(device), name_(name), cost_(cost), meta_(device.kind() == DeviceKind::meta) {
  if (device_.timed()) start_ = finished();
}

double OpScope::finished() const {
  if (!meta_ && device_.kind() == DeviceKind::cuda) device_.synchronize();  // its work runs behind the calls
  return now();
}

OpScope::~OpScope() {
  if (device_.recording()) device_.log_op(name_, cost_, device_.timed() ? finished() - start_ : 0);
}

}  // namespace capstan
