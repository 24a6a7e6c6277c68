// defines: Recorded: work of a fixed shape that a device is asked for again and again.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace capstan {

/// The first time the work is done as it stands, so that a GPU's library makes its plans; the second time it is recorded; from
/// then on the record is replayed, and the function is not called. All that it reads and writes must stay where it is, and what it
/// makes besides must be gone when it returns. Devices that do not record do the work every time.
class CAPSTAN_API Recorded {
 public:
  /// `required`: Error(runtime) with the reason when the work cannot be recorded; otherwise it is then done every time.
  Recorded(Device& device, bool wanted, bool required);
  ~Recorded();
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;
  void run(const std::function<void()>& work);
  bool replays() const { return record_ >= 0; }
  /// Why it is not recorded; "" when it is or was not asked for yet.
  const std::string& why_not() const { return why_not_; }

 private:
  std::shared_ptr<Device> device_;
  bool wanted_, required_, warm_ = false;
  std::int64_t record_ = -1;
  std::string why_not_;
};

}  // namespace capstan
