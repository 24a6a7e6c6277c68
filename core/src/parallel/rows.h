// defines: padded_rows(), pad_rows(): batches whose rows tensor ranks can share evenly.
#pragma once
#include <capstan/batch.h>
#include <capstan/export.h>

#include <cstdint>

namespace capstan::parallel {

/// `rows` up to a multiple of the tensor ranks.
inline std::int64_t padded_rows(std::int64_t rows, int tensor_ranks) {
  return (rows + tensor_ranks - 1) / tensor_ranks * tensor_ranks;
}

/// `batch` with rows of the dead sequence added up to a multiple of `tensor_ranks`: token 0, no target, weight 0, position
/// 0, sample_id 0. Every stream of [T, ...] grows; itself when nothing is missing. A loader gives its batches that capacity
/// at once instead.
CAPSTAN_API Batch pad_rows(const Batch& batch, int tensor_ranks);

}  // namespace capstan::parallel
