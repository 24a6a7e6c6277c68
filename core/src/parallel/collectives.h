// defines: tensor_ranks(), context_ranks(); gather_rows, reduce_scatter_rows, gather_columns: what layers
// communicate, differentiable. Each backward is the transpose of its forward, so that the gradient of a sum over ranks
// stays exact whatever is composed of them (docs/maintainers/mesh.md, the gradient rule).
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>
#include <capstan/model.h>
#include <capstan/tensor.h>

#include <cstdint>
#include <span>

namespace capstan::parallel {

/// The ranks that share matrices or sequences with this one in `context`; null when there are no others.
CAPSTAN_API Communicator* tensor_ranks(const ForwardContext& context);
CAPSTAN_API Communicator* context_ranks(const ForwardContext& context);

// f64, f32, bf16; on the meta device shapes and Cost::comm (bytes that this rank sends) alone. Every rank of
// `comm` makes the same calls in the same order, backward included. Errors: Error(programming) on shapes.

/// x [n, ...] of every rank, one after the other: [ranks * n, ...]. Backward: reduce_scatter_rows.
CAPSTAN_API Tensor gather_rows(const Tensor& x, Communicator& comm);
/// x [ranks * n, ...] added over the ranks; this rank's n rows of it. Backward: gather_rows.
CAPSTAN_API Tensor reduce_scatter_rows(const Tensor& x, Communicator& comm);
/// x [n, widths[rank]] of every rank side by side: [n, sum of widths]. Backward: the sum over ranks of this rank's columns.
CAPSTAN_API Tensor gather_columns(const Tensor& x, std::span<const std::int64_t> widths, Communicator& comm);
}  // namespace capstan::parallel
