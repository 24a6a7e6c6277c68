// defines: RankWork, run_rank(): one rank of a training job, from the launch to its end.
#pragma once
#include "launch/launch.h"

#include <string>
#include <vector>

namespace capstan::program {

struct RankWork {
  std::string recipe, executable;
  std::vector<std::string> overrides;
  bool supervised = false;   ///< another process starts the ranks and hears of how it went by records (launch/record.h)
  int columns = 0;           ///< of the terminal that the supervisor writes to; 0: it does not say
};

/// Trains as rank `launch.rank`. Returns the exit code: 0, or 1 after a signal. When it fails on one of several ranks, all
/// ranks end, one of them prints why, and this does not return; on a single rank it throws, or says so by a record.
int run_rank(const launch::Launch& launch, const RankWork& work);

}  // namespace capstan::program
