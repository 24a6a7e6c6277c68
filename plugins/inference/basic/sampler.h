// defines: filter, sample: from logits to a token, exactly. Knows nothing of models.
#pragma once
#include <capstan/inference.h>
#include <capstan/random.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace capstan::basic {

/// The tokens that filtering leaves, in order of id, and their probabilities, which sum to 1.
struct Candidates {
  std::vector<std::int32_t> ids;
  std::vector<double> probabilities;
};

/// softmax(logits / temperature) (temperature > 0), then in this order:
///   top-k  keeps the k most likely tokens; of equal ones those with the lower id;
///   top-p  of what is left, renormalized and ordered by falling probability (then by id), keeps the shortest start
///          whose sum reaches p, at least one token (Holtzman et al. 2020);
///   min-p  of what is left, keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024).
/// All in f64. Error(runtime) when a logit is NaN or positive infinity, or all are negative infinity.
Candidates filter(std::span<const float> logits, const SamplingParams& params);

/// The token for place `position` of a request. Temperature 0: the largest logit, of equal ones the lowest id. Else the
/// first of filter()'s tokens, by id, at which the running sum of probabilities exceeds a uniform number. That number is
/// a function of (params.seed, request, position) alone: other requests, batches and restarts do not change it.
std::int32_t sample(std::span<const float> logits, const SamplingParams& params, std::int64_t request,
                    std::int64_t position);

}  // namespace capstan::basic
