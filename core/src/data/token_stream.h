// defines: Rows, DocumentSplit, TokenStream: the endless stream of rows that a set's documents give, epoch after epoch.
#pragma once
#include <capstan/export.h>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/indexed_dataset.h"

namespace capstan::data {

/// Rows of a batch on the host. Row t sees tokens[t] and predicts targets[t] (-1 with weight 0: nothing).
struct Rows {
  std::vector<std::int32_t> tokens, targets, starts;  ///< starts: first row of each sequence, without the end
  std::vector<float> weight;
  std::vector<std::int64_t> sample_ids;
};

/// Documents for training and for validation: disjoint, both in ascending order, empty documents left out.
struct CAPSTAN_API DocumentSplit {
  std::vector<std::uint32_t> train, validation;
  /// `share` of the documents, at least 1 when above 0, validate: those of the smallest hashed index, so the
  /// choice depends on nothing but the dataset. Error(input) when no document would be left to train on.
  static DocumentSplit make(const IndexedDataset& dataset, double share);
};

/// Row p of epoch e = p / tokens() is token p % tokens() of the documents in epoch e's order, which is a pure function
/// of (seed, name, e). Its target is the next token of the same document; a document's last row has none, or the next
/// document's first token with `across`. Not thread-safe (it caches the orders of two epochs: 12 bytes a document).
class CAPSTAN_API TokenStream {
 public:
  struct Settings {
    std::uint64_t seed = 0;
    std::string name;             ///< addresses the order
    bool across = false;          ///< attend (and predict) across documents
    std::int64_t vocabulary = 0;  ///< ids at or above are Error(input)
    bool endless = true;          ///< false: one epoch, and the last row has no successor
  };
  TokenStream(std::shared_ptr<const IndexedDataset> dataset, std::vector<std::uint32_t> documents, Settings settings);

  std::int64_t tokens() const { return tokens_; }  ///< rows of an epoch
  const IndexedDataset& dataset() const { return *dataset_; }
  std::span<const std::uint32_t> documents() const { return documents_; }
  const Settings& settings() const { return settings_; }

  /// Appends rows [first, first + count): a sequence starts at `first` and, unless across, at every document.
  /// sample_ids run from `first_id`.
  void append(std::int64_t first, std::int64_t count, std::int64_t first_id, Rows& out);

 private:
  struct Epoch {
    std::int64_t number = -1;
    std::vector<std::uint32_t> order;  ///< positions in documents_
    std::vector<std::int64_t> begin;   ///< row at which each document of the order begins, then tokens_
  };
  const Epoch& epoch(std::int64_t number);
  std::int32_t token(std::int64_t position);

  std::shared_ptr<const IndexedDataset> dataset_;
  std::vector<std::uint32_t> documents_;
  Settings settings_;
  std::int64_t tokens_ = 0;
  std::array<Epoch, 2> epochs_;
  std::vector<std::int32_t> scratch_;
};

}  // namespace capstan::data
