// defines: Stopwatch, WallStopwatch: how long work on a device takes.
#pragma once
#include <capstan/device.h>
#include <capstan/export.h>

#include <functional>

namespace capstan::bench {

/// What measures; tests put a clock of their own here.
class CAPSTAN_API Stopwatch {
 public:
  virtual ~Stopwatch();
  /// Seconds of one call of `work`, which may return before the device is done.
  virtual double seconds(Device& device, const std::function<void()>& work) = 0;
};

/// The median over groups of calls. A group is so long that waiting for its end does not count.
class CAPSTAN_API WallStopwatch final : public Stopwatch {
 public:
  explicit WallStopwatch(double group_seconds = 0.02, int groups = 7) : group_seconds_(group_seconds), groups_(groups) {}
  double seconds(Device& device, const std::function<void()>& work) override;

 private:
  double group_seconds_;
  int groups_;
};

}  // namespace capstan::bench
