#include <capstan/error.h>
#include <capstan/recorded.h>
#include <kernels/backend.h>
#include <kernels/queue.h>

#include <exception>
#include <utility>

namespace capstan {

Recorded::Recorded(Device& device, bool wanted, bool required)
    : device_(device.shared_from_this()), wanted_(wanted && device.kind() == DeviceKind::cuda), required_(required) {
  if (required && device.kind() != DeviceKind::cuda) fail(Fault::input, "cuda_graphs", "there is no GPU to record work on; expected auto or off here");
}

Recorded::~Recorded() {
  if (record_ >= 0) device_->backend().queue()->forget_record(record_);
}

void Recorded::run(const std::function<void()>& work) {
  if (!wanted_ || !why_not_.empty() || !std::exchange(warm_, true)) return work();
  kernels::Queue& queue = *device_->backend().queue();
  if (record_ < 0) {
    queue.begin_record(0);
    try {
      work();
      record_ = queue.end_record();
    } catch (const std::exception& e) {
      queue.cancel_record();
      if (required_) fail(Fault::runtime, "cuda_graphs", std::string("the work cannot be recorded: ") + e.what());
      why_not_ = e.what();
      return work();
    }
  }
  queue.replay(record_, 0);
}

}  // namespace capstan
