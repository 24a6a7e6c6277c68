// The bigram baseline: one pass over the training tokens, one over the validation targets.
#include "data/bigram.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace capstan::data {

std::int64_t bigram_bytes(std::int64_t vocabulary) {
  return vocabulary > 4096 ? 0 : (vocabulary + 1) * vocabulary * static_cast<std::int64_t>(sizeof(std::int64_t));
}

std::optional<double> bigram_cross_entropy(DataSource& source, std::int64_t samples, std::int64_t most) {
  const std::int64_t vocabulary = source.tokenizer().vocabulary;
  if (bigram_bytes(vocabulary) == 0 || source.validation_tokens() == 0 || samples <= 0) return std::nullopt;
  const auto words = static_cast<std::size_t>(vocabulary);
  std::vector<std::int64_t> pairs(words * words, 0), first(words, 0);
  const std::int64_t stride = (source.train_tokens() + most - 1) / most;
  const bool across = source.options().attend_across_documents;
  std::vector<std::int32_t> tokens;
  constexpr std::int64_t chunk = 1 << 16;
  for (const TokenStream& stream : source.train_streams()) {
    const IndexedDataset& dataset = stream.dataset();
    const auto documents = stream.documents();
    std::int32_t previous = -1;
    for (std::size_t i = 0; i < documents.size(); i += static_cast<std::size_t>(stride)) {
      if (!across) previous = -1;
      std::int64_t at = dataset.document_begin(documents[i]);
      const std::int64_t end = dataset.document_begin(documents[i] + std::int64_t{1});
      while (at < end) {
        tokens.resize(static_cast<std::size_t>(std::min(chunk, end - at)));
        dataset.read(at, tokens, vocabulary);
        for (const std::int32_t token : tokens) {
          if (previous >= 0) {
            ++pairs[static_cast<std::size_t>(previous) * words + static_cast<std::size_t>(token)];
            ++first[static_cast<std::size_t>(previous)];
          }
          previous = token;
        }
        at += static_cast<std::int64_t>(tokens.size());
      }
    }
  }
  double sum = 0;
  std::int64_t targets = 0;
  for (const HostBatch& batch : source.host_validation(samples)) {
    for (std::size_t t = 0; t < batch.rows.tokens.size(); ++t) {
      if (batch.rows.weight[t] == 0) continue;
      const auto a = static_cast<std::size_t>(batch.rows.tokens[t]), b = static_cast<std::size_t>(batch.rows.targets[t]);
      sum += std::log(static_cast<double>(first[a] + vocabulary)) - std::log(static_cast<double>(pairs[a * words + b] + 1));
      ++targets;
    }
  }
  if (targets == 0) return std::nullopt;
  return sum / static_cast<double>(targets);
}

}  // namespace capstan::data
