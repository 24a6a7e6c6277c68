// Splitting, shuffling and walking documents.
#include "data/token_stream.h"

#include <capstan/error.h>
#include <capstan/random.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace capstan::data {

DocumentSplit DocumentSplit::make(const IndexedDataset& dataset, double share) {
  if (!(share >= 0 && share < 1)) {
    fail(Fault::input, "validation", fmt::format("expected a share of the documents, 0 <= share < 1, got {}", share));
  }
  if (dataset.documents() > std::int64_t{UINT32_MAX}) {
    fail(Fault::input, dataset.prefix(),
         fmt::format("{} documents: at most {} are supported; build several sets and blend them", dataset.documents(),
                     UINT32_MAX));
  }
  std::vector<std::uint32_t> all;
  all.reserve(static_cast<std::size_t>(dataset.documents()));
  for (std::int64_t d = 0; d < dataset.documents(); ++d) {
    if (dataset.document_length(d) > 0) all.push_back(static_cast<std::uint32_t>(d));
  }
  if (all.empty()) fail(Fault::input, dataset.prefix(), "no document has any token; build the dataset again");
  DocumentSplit split;
  if (share == 0) {
    split.train = std::move(all);
    return split;
  }
  const auto count =
      std::max<std::size_t>(1, static_cast<std::size_t>(std::llround(share * static_cast<double>(all.size()))));
  if (count >= all.size()) {
    fail(Fault::input, dataset.prefix(),
         fmt::format(
             "{} documents cannot be split into training and validation: with a share of {} for validation none is left "
             "to train on; build the set with smaller documents (--format lines), or set the share to 0",
             all.size(), share));
  }
  // mix64 maps distinct indices to distinct values, so that the order has no ties.
  constexpr std::uint64_t salt = hash_name("data.validation");
  const auto hashed = [](std::uint32_t d) { return kernels::mix64(salt ^ d); };
  std::vector<std::uint32_t> by_hash = all;
  std::nth_element(by_hash.begin(), by_hash.begin() + static_cast<std::ptrdiff_t>(count), by_hash.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return hashed(a) < hashed(b); });
  split.validation.assign(by_hash.begin(), by_hash.begin() + static_cast<std::ptrdiff_t>(count));
  std::sort(split.validation.begin(), split.validation.end());
  std::set_difference(all.begin(), all.end(), split.validation.begin(), split.validation.end(),
                      std::back_inserter(split.train));
  return split;
}

TokenStream::TokenStream(std::shared_ptr<const IndexedDataset> dataset, std::vector<std::uint32_t> documents,
                         Settings settings)
    : dataset_(std::move(dataset)), documents_(std::move(documents)), settings_(std::move(settings)) {
  for (const std::uint32_t d : documents_) tokens_ += dataset_->document_length(d);
  if (tokens_ == 0) fail(Fault::programming, "TokenStream", "no tokens");
}

const TokenStream::Epoch& TokenStream::epoch(std::int64_t number) {
  Epoch& e = epochs_[static_cast<std::size_t>(number & 1)];
  if (e.number == number) return e;
  e.number = -1;
  e.order.resize(documents_.size());
  std::iota(e.order.begin(), e.order.end(), 0u);
  const Rng rng(settings_.seed, "data.order." + settings_.name, static_cast<std::uint64_t>(number));
  for (std::size_t i = e.order.size(); i > 1; --i) std::swap(e.order[i - 1], e.order[rng.below(i - 1, i)]);
  e.begin.resize(documents_.size() + 1);
  std::int64_t row = 0;
  for (std::size_t i = 0; i < e.order.size(); ++i) {
    e.begin[i] = row;
    row += dataset_->document_length(documents_[e.order[i]]);
  }
  e.begin.back() = row;
  e.number = number;
  return e;
}

std::int32_t TokenStream::token(std::int64_t position) {
  const Epoch& e = epoch(position / tokens_);
  const std::int64_t row = position % tokens_;
  const auto next = std::upper_bound(e.begin.begin(), e.begin.end(), row);
  const auto i = static_cast<std::size_t>(next - e.begin.begin() - 1);
  std::int32_t value = 0;
  dataset_->read(dataset_->document_begin(documents_[e.order[i]]) + row - e.begin[i], std::span(&value, 1),
                 settings_.vocabulary);
  return value;
}

void TokenStream::append(std::int64_t first, std::int64_t count, std::int64_t first_id, Rows& out) {
  if (first < 0 || count < 0 || (!settings_.endless && first + count > tokens_)) {
    fail(Fault::programming, "TokenStream", fmt::format("rows {} to {} of {}", first, first + count, tokens_));
  }
  const std::int64_t last = first + count;
  for (std::int64_t position = first; position < last;) {
    const Epoch& e = epoch(position / tokens_);
    const std::int64_t base = position - position % tokens_;
    const auto next = std::upper_bound(e.begin.begin(), e.begin.end(), position - base);
    const auto i = static_cast<std::size_t>(next - e.begin.begin() - 1);
    const std::int64_t document = documents_[e.order[i]];
    const std::int64_t begin = base + e.begin[i], end = base + e.begin[i + 1], until = std::min(end, last);
    // One token past the piece where the document goes on: the last row's target.
    const bool goes_on = until < end;
    scratch_.resize(static_cast<std::size_t>(until - position + (goes_on ? 1 : 0)));
    dataset_->read(dataset_->document_begin(document) + position - begin, scratch_, settings_.vocabulary);

    if (!settings_.across || position == first) out.starts.push_back(static_cast<std::int32_t>(out.tokens.size()));
    out.tokens.insert(out.tokens.end(), scratch_.begin(), scratch_.begin() + (until - position));
    out.targets.insert(out.targets.end(), scratch_.begin() + 1, scratch_.end());
    out.weight.insert(out.weight.end(), static_cast<std::size_t>(until - position), 1.0f);
    if (!goes_on) {
      const bool has_successor = settings_.across && (settings_.endless || until < tokens_);
      out.targets.push_back(has_successor ? token(until) : -1);
      if (!has_successor) out.weight.back() = 0.0f;
    }
    for (std::int64_t p = position; p < until; ++p) out.sample_ids.push_back(first_id + p - first);
    position = until;
  }
}

}  // namespace capstan::data
