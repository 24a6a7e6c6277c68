// defines: failure_of(): why a job failed, in the words that are to be printed.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>

#include <string>

namespace capstan {

/// "[rank 2] rank 2 (step 7, backward) failed: ...; it was expected in all_gather 3 of communicator 'shard/gather' by rank 0";
/// "" when nothing is known to have failed, or the world is of one rank.
CAPSTAN_API std::string failure_of(const World& world);

}  // namespace capstan
