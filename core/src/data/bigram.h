// defines: bigram_bytes(), bigram_cross_entropy(): what a model that knows only the last token would reach.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <optional>

#include "data/loader.h"

namespace capstan::data {

/// Bytes of the counts of a bigram model of `vocabulary` words; 0 where there is none, above 4,096.
CAPSTAN_API std::int64_t bigram_bytes(std::int64_t vocabulary);

/// Cross-entropy, in nats per token, of p(b | a) = (count(a, b) + 1) / (count(a) + vocabulary) on exactly the targets of
/// source.validation(samples), with counts from the training documents (when they have more than `most` tokens, from
/// every k-th of them). nullopt without validation documents or with a vocabulary that bigram_bytes() is 0 for.
CAPSTAN_API std::optional<double> bigram_cross_entropy(DataSource& source, std::int64_t samples,
                                                       std::int64_t most = std::int64_t{1} << 28);

}  // namespace capstan::data
