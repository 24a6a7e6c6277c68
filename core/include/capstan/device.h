// defines: Device (memory, accounting, cost ledger), Cost, OpScope.
#pragma once
#include <capstan/dtype.h>
#include <capstan/export.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

namespace kernels {
class Backend;
namespace cpu { class Context; }
}  // namespace kernels

enum class DeviceKind : std::uint8_t { meta, cpu, cuda };

/// What an op costs. flop counts multiply and add apart; read, write and comm are bytes.
struct Cost {
  double flop = 0, read = 0, write = 0, comm = 0;
  Cost& operator+=(const Cost& o) { flop += o.flop, read += o.read, write += o.write, comm += o.comm; return *this; }
};

/// One row of a device's ledger: an op's name, how often it ran, its summed cost and (when timed) seconds.
struct OpRecord {
  std::string name;
  std::int64_t calls = 0;
  Cost cost;
  double seconds = 0;
};

/// A place where tensors live. It owns the memory pool, counts what it hands out, and keeps a ledger of
/// the ops that ran on it. The trainer makes one; there is no global device. The meta device hands out
/// no memory but does count: running a step on it gives the FLOPs and the memory plan of the real step.
class CAPSTAN_API Device : public std::enable_shared_from_this<Device> {
 public:
  virtual ~Device();
  virtual DeviceKind kind() const = 0;
  std::string_view name() const;

  /// 64-byte aligned, not cleared. Throws Error(runtime) saying what was asked and what is held.
  virtual void* allocate(std::int64_t bytes) = 0;
  virtual void release(void* data, std::int64_t bytes) noexcept = 0;

  /// Bytes that tensors hold now, and the most that they held at once since reset_peak().
  std::int64_t bytes_held() const { return held_; }
  std::int64_t bytes_peak() const { return peak_; }
  void reset_peak() { peak_ = held_; }
  /// Bytes that the pool took from the system.
  virtual std::int64_t bytes_reserved() const { return held_; }

  /// Turns the ledger on. `timed` measures each op's wall time as well.
  void record(bool on, bool timed = false) { recording_ = on, timed_ = on && timed; }
  bool recording() const { return recording_; }
  bool timed() const { return timed_; }
  void clear_ledger() { ledger_.clear(); }
  const std::vector<OpRecord>& ledger() const { return ledger_; }
  Cost total_cost() const;
  void log_op(std::string_view name, const Cost& cost, double seconds);

  /// The kernels that work on this device's memory; Error(programming) on the meta device.
  virtual kernels::Backend& backend();
  /// The host's threads, GEMM primitives and scratch; Error(programming) on the meta device.
  virtual kernels::cpu::Context& cpu();
  /// Waits until everything that was asked of the device is done; throws what its kernels found wrong.
  void synchronize();
  /// "NVIDIA H200, 139.80 GiB" or "2 threads of Intel(R) Xeon(R) Processor, 23.4 GiB"
  virtual std::string describe() const;

 protected:
  void count(std::int64_t bytes) { held_ += bytes; if (held_ > peak_) peak_ = held_; }

 private:
  std::int64_t held_ = 0, peak_ = 0;
  bool recording_ = false, timed_ = false;
  std::vector<OpRecord> ledger_;
};

/// A CPU device with its own pool. `threads` 0 means every core this process may run on.
CAPSTAN_API std::shared_ptr<Device> make_cpu_device(int threads = 0);
/// A device of shapes and costs only.
CAPSTAN_API std::shared_ptr<Device> make_meta_device();
/// An NVIDIA GPU of this machine, by CUDA's number; `threads` for what the host does for it, as above. Error(input) saying
/// what is missing when there is none to use.
CAPSTAN_API std::shared_ptr<Device> make_cuda_device(int index = 0, int threads = 0);
/// Why make_cuda_device() would fail here: "" when it would not.
CAPSTAN_API std::string cuda_problem();

/// Wraps the work of one op: charges its cost to the device's ledger and times it when asked to.
class CAPSTAN_API OpScope {
 public:
  OpScope(Device& device, std::string_view name, Cost cost);
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;
  /// True on the meta device: the op has done its part once the output's shape exists.
  bool meta() const { return meta_; }

 private:
  double finished() const;  ///< the time, when the device's work is done
  Device& device_;
  std::string_view name_;
  Cost cost_;
  double start_ = 0;
  bool meta_;
};

}  // namespace capstan
