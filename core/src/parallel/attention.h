// defines: attention(): queries here, keys and values on all context ranks.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>
#include <capstan/ops.h>

namespace capstan::parallel {

/// ops::attention over sequences that context ranks share (space.cut): keys and values are gathered in the sequences' order,
/// each row attends from its true position. Its backward sums the gradients of keys and values over the ranks that used
/// them, each getting those of its own rows.
CAPSTAN_API Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Space& space,
                             const ops::AttentionShape& shape, Communicator& comm);

}  // namespace capstan::parallel
