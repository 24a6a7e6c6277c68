// Sampling: see sampler.h.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace capstan::basic {
namespace {

/// The lowest id of the largest logit, which must be a number.
std::size_t largest(std::span<const float> logits) {
  std::size_t best = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == INFINITY) {
      fail(Fault::runtime, "sampler",
           "the logit of token " + std::to_string(i) + " is " + (std::isnan(logits[i]) ? "not a number" : "infinite") +
               ": the model's weights are broken; use an earlier checkpoint");
    }
    if (logits[i] > logits[best]) best = i;
  }
  if (logits.empty() || logits[best] == -INFINITY) fail(Fault::runtime, "sampler", "no token has a finite logit");
  return best;
}

}  // namespace

Candidates filter(std::span<const float> logits, const SamplingParams& params) {
  const double highest = logits[largest(logits)];
  struct Entry {
    std::int32_t id;
    double weight;
  };
  std::vector<Entry> entries;
  entries.reserve(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) {
    // Weights relative to the likeliest token, which has 1: no overflow at any temperature.
    const double w = std::exp((static_cast<double>(logits[i]) - highest) / params.temperature);
    if (w > 0) entries.push_back({static_cast<std::int32_t>(i), w});
  }
  const auto likelier = [](const Entry& a, const Entry& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  };
  const auto by_id = [](const Entry& a, const Entry& b) { return a.id < b.id; };
  const auto total = [&] {
    return std::accumulate(entries.begin(), entries.end(), 0.0, [](double sum, const Entry& e) { return sum + e.weight; });
  };
  if (params.top_k > 0 && params.top_k < static_cast<std::int64_t>(entries.size())) {
    std::nth_element(entries.begin(), entries.begin() + params.top_k, entries.end(), likelier);
    entries.resize(static_cast<std::size_t>(params.top_k));
  }
  if (params.top_p < 1) {
    std::sort(entries.begin(), entries.end(), likelier);
    const double goal = params.top_p * total();
    double sum = 0;
    std::size_t keep = 0;
    while (keep < entries.size() && (keep == 0 || sum < goal)) sum += entries[keep++].weight;
    entries.resize(keep);
  }
  if (params.min_p > 0) std::erase_if(entries, [&](const Entry& e) { return e.weight < params.min_p; });
  std::sort(entries.begin(), entries.end(), by_id);
  Candidates out;
  const double sum = total();
  for (const Entry& e : entries) {
    out.ids.push_back(e.id);
    out.probabilities.push_back(e.weight / sum);
  }
  return out;
}

std::int32_t sample(std::span<const float> logits, const SamplingParams& params, std::int64_t request,
                    std::int64_t position) {
  if (params.temperature == 0) return static_cast<std::int32_t>(largest(logits));
  const Candidates candidates = filter(logits, params);
  const Rng rng(params.seed, "sampler", static_cast<std::uint64_t>(request));
  const auto place = 2 * static_cast<std::uint64_t>(position);
  const std::uint64_t bits = (std::uint64_t{rng.bits(place)} << 32) | rng.bits(place + 1);
  const double u = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
  double sum = 0;
  for (std::size_t i = 0; i < candidates.ids.size(); ++i) {
    sum += candidates.probabilities[i];
    if (sum > u) return candidates.ids[i];
  }
  return candidates.ids.back();  // rounding left the sum a little under 1
}

}  // namespace capstan::basic
