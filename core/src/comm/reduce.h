// defines: reduce_ranks: the sum (max, min) of one array of each rank, in rank order.
#pragma once
#include "comm/communicator.h"

#include <capstan/dtype.h>

#include <cstdint>
#include <span>

namespace capstan::comm {

/// out[i] = in[0][i] op in[1][i] op ... for `count` elements; sources are added in their order, so that the bits do not
/// depend on who adds. bf16 is added in f32 and rounded once; integers wrap; a NaN stays one under max and min. `out` may
/// be one of the sources.
void reduce_ranks(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op);
/// The same, bf16 sources into an f32 result: a part of a sum that goes on elsewhere. Other types: as above.
void reduce_partial(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op);
/// What partial sums of `dtype` are made in: f32 for bf16, else the type itself.
DType partial_of(DType dtype);
/// Last step of a sum of partials: `in` of partial_of(dtype), `out` of dtype.
void reduce_finish(std::span<const void* const> in, void* out, std::int64_t count, DType dtype, Reduction op);
/// Whether collectives can reduce this type.
bool reducible(DType dtype);

}  // namespace capstan::comm
