// defines: make_paper_world(): a job of which only the arithmetic exists.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>

#include <memory>

namespace capstan::plan {

/// Rank `rank` of `size`, of which the others never run. Its collectives return at once and leave what others would
/// send as if it came from this rank too; so layouts compare equal, and a model on the meta device runs as on any rank.
CAPSTAN_API std::shared_ptr<World> make_paper_world(int rank, int size, int per_host = 8);

}  // namespace capstan::plan
