// defines: CallTimes, call_times(): seconds of a call's work on a device.
#pragma once
#include "plan/predict.h"

namespace capstan::plan {

/// Of one call and microbatch. Communication inside of the call (rows among tensor ranks, keys and values among context
/// ranks) apart.
struct CallTimes {
  double forward = 0, backward = 0;      ///< compute; backward: what is computed again included
  double weight = 0;                     ///< of backward, the gradients of its matrices
  double forward_wait = 0, backward_wait = 0;  ///< communication that nothing hides
};

/// A communication inside of calls, found in a ledger.
struct InnerTraffic {
  std::string axes, what;
  Collective collective = Collective::all_gather;
  double calls = 0, bytes = 0;  ///< sent
};

/// What the records say was sent; empty when `r` sent nothing.
std::optional<InnerTraffic> inner_traffic(const OpRecord& r);

CallTimes call_times(const CallProfile& call, const Profile& profile, const Setting& setting, const DeviceModel& device, const Assumptions& assumptions);

/// Floating point operations of records, what communication adds left out.
double flop_of(const std::vector<OpRecord>& records);

}  // namespace capstan::plan
