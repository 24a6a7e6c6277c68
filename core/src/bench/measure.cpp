// Seconds by the host's clock, around groups of calls.
#include "bench/measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

namespace capstan::bench {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Stopwatch::~Stopwatch() = default;

double WallStopwatch::seconds(Device& device, const std::function<void()>& work) {
  const auto group = [&](int calls) {
    const double begin = now();
    for (int i = 0; i < calls; ++i) work();
    device.synchronize();
    return (now() - begin) / calls;
  };
  group(1);  // plans are made and memory is touched
  const double once = std::max(group(2), 1e-7);
  const int calls = static_cast<int>(std::clamp(std::ceil(group_seconds_ / once), 1.0, 2000.0));
  std::vector<double> times;
  for (int i = 0; i < groups_; ++i) times.push_back(group(calls));
  std::nth_element(times.begin(), times.begin() + groups_ / 2, times.end());
  return times[static_cast<std::size_t>(groups_ / 2)];
}

}  // namespace capstan::bench
