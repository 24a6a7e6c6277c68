// defines: LocalBox, boxes_of(): where a run of a local tensor's elements lies in the global one.
#pragma once
#include "mesh/placement.h"

#include <capstan/export.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <vector>

namespace capstan {

/// A box of the global tensor whose elements lie one after the other in local memory.
struct LocalBox {
  std::vector<std::int64_t> begin, extent;  ///< global
  std::int64_t at = 0;                      ///< first element, row-major in the local tensor
  bool owned = true;                        ///< this tensor rank is the first that holds it
};

/// Elements [begin, end) of the row-major local tensor of `shape` as boxes: at most 2 rank - 1 of them per run that they
/// meet, more when a run cuts a later dimension. `placement` null: local is global.
CAPSTAN_API std::vector<LocalBox> boxes_of(const Dims& shape, const TensorPlacement* placement, std::int64_t begin, std::int64_t end);

}  // namespace capstan
