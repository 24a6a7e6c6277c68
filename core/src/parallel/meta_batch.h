// defines: meta_batch(): a batch of shapes, for steps on the meta device.
#pragma once
#include <capstan/batch.h>

#include <cstdint>

namespace capstan::parallel {

/// `samples` sequences of `length` tokens on a meta device; with `context` ranks the chunks of the first of them, rows
/// padded for `tensor` ranks. step_weight is its rows.
Batch meta_batch(Device& device, std::int64_t samples, std::int64_t length, int context = 1, int tensor = 1);

}  // namespace capstan::parallel
