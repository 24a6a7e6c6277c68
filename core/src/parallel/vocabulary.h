// defines: vocab_embedding(), vocab_cross_entropy(): a vocabulary of which each tensor rank holds a run.
#pragma once
#include "comm/communicator.h"

#include <capstan/export.h>
#include <capstan/ops.h>

#include <cstdint>

namespace capstan::parallel {

/// ops::embedding of i32 ids [T] of [0, vocabulary) by ranks that hold rows [begin, begin + table.size(0)) of the table:
/// [T / ranks, C], this rank's stream rows. All ranks give the same ids. Error(programming) on an id outside.
CAPSTAN_API Tensor vocab_embedding(const Tensor& table, const Tensor& ids, std::int64_t begin, std::int64_t vocabulary,
                                   Communicator& comm);

/// ops::linear_cross_entropy by ranks that hold rows [begin, begin + weight.size(0)) of a weight [vocabulary, C]: x are this
/// rank's stream rows [T / ranks, C], targets i32 [T] and weights f32 [T] of all rows; scores and objective are of the
/// stream rows. A chunk of logits is [rows, vocabulary / ranks]; what ranks tell each other are three numbers a row.
CAPSTAN_API ops::HeadScore vocab_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                               const Tensor* weights, bool grad, std::int64_t begin, std::int64_t vocabulary,
                                               Communicator& comm);

}  // namespace capstan::parallel
