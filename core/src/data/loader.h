// defines: DataOptions, DataCursor, DataSource: the microbatches that a trainer asks for.
#pragma once
#include <capstan/batch.h>
#include <capstan/device.h>
#include <capstan/export.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/token_stream.h"

namespace capstan::data {

struct DataSet {
  std::string prefix;  ///< <prefix>.bin and <prefix>.idx
  double weight = 1;   ///< share of the samples, relative to the other sets'
};

struct DataOptions {
  std::vector<DataSet> sets;
  std::int64_t sequence_length = 0;  ///< rows of a sample
  std::int64_t batch_size = 0;       ///< samples of an optimizer step
  std::int64_t micro_batch = 0;      ///< samples of a microbatch; the last one of a step may have fewer
  double validation = 0;             ///< share of each set's documents that are kept from training
  bool attend_across_documents = false;
  int prefetch = 2;  ///< steps made ahead by a thread; 0: no thread
  std::uint64_t seed = 0;
  /// The place of an option in messages, by its name here ("sequence_length"): "recipe.yaml:7, data.sequence_length". Without
  /// it the name stands.
  std::function<std::string(const std::string& name)> where;
  /// Ranks that share the samples of a step, and which of them this is. A microbatch is `micro_batch` samples of each.
  int ranks = 1, rank = 0;
  /// With several ranks: the sum over them, which every rank calls for at the same time.
  std::function<double(double)> sum_over_ranks;
};

/// Which tokenizer the model expects.
struct TokenizerIdentity {
  std::string name;
  std::int64_t vocabulary = 0;
};

/// Where training stands in the data. It counts samples, so it outlives a change of batch size, microbatch and mesh.
struct CAPSTAN_API DataCursor {
  std::int64_t sample = 0;           ///< samples handed out
  std::vector<std::int64_t> counts;  ///< of them, from each set
  std::int64_t sequence_length = 0;  ///< rows of a sample: the unit
  std::vector<std::int64_t> tokens;  ///< training tokens of each set, to know it again
  bool operator==(const DataCursor&) const = default;
  std::string to_json() const;
  /// Error(input) at `where` on text that is not a cursor.
  static DataCursor from_json(const std::string& text, const std::string& where = "data cursor");
};

/// One microbatch on the host.
struct HostBatch {
  Rows rows;
  std::int64_t samples = 0;  ///< capacity is samples * sequence_length; rows may fill less (the end of validation, or a
                             ///< rank that has no sample left: then one sample of dead rows)
};

/// An endless, deterministic stream of training batches and a fixed set of validation batches.
///
/// A set's documents are shuffled for each epoch and laid end to end; that stream is cut into samples of L rows, and the
/// samples of about an epoch are shuffled among themselves, so every token is a row once an epoch and a batch does not
/// come from one document. Global sample i comes from the set that lags its weight most:
/// argmax of w max(i, 1) - count, the first on a tie. None of this depends on batch_size, micro_batch or ranks: ranks take
/// neighbouring samples of each microbatch, as evenly as they go, and all make the same number of microbatches.
/// One thread at a time may call its members.
class CAPSTAN_API DataSource {
 public:
  /// Opens the sets and checks them against the tokenizer (by their sidecar where they have one). Error(input).
  DataSource(DataOptions options, TokenizerIdentity tokenizer, std::shared_ptr<Device> device);
  ~DataSource();
  DataSource(const DataSource&) = delete;
  DataSource& operator=(const DataSource&) = delete;

  /// The microbatches of one optimizer step. Streams tokens i32, targets i32 and weight f32 of
  /// [samples * sequence_length]; the space's sample_ids are global sample * sequence_length + row. What the
  /// prefetch thread threw is thrown here, again at every call until seek().
  std::vector<Batch> next();
  /// Behind the last batches that next() returned.
  DataCursor cursor() const { return cursor_; }
  /// next() goes on behind `cursor`; Error(input) when the cursor is of other data, at the option that says so, or when it is
  /// damaged, at `where`.
  void seek(const DataCursor& cursor, const std::string& where = "data cursor");

  /// The first `samples` samples of the validation documents, fewer when they end, in batches of micro_batch; always
  /// the same. The last one may be filled in part. step_weight is of all of them together. Ranks take turns: each gets
  /// every ranks-th, and a batch of dead rows where the others have one more.
  std::vector<Batch> validation(std::int64_t samples);
  std::int64_t validation_samples() const;  ///< all that there are

  std::int64_t train_tokens() const;
  std::int64_t validation_tokens() const;
  std::int64_t train_documents() const;
  std::int64_t validation_documents() const;
  /// One line for a person: sets, documents and tokens, "of which" for validation.
  std::string describe() const;

  const DataOptions& options() const;
  const TokenizerIdentity& tokenizer() const;
  std::span<const TokenStream> train_streams() const;  ///< constant members only: the thread uses the others
  std::vector<HostBatch> host_validation(std::int64_t samples);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  DataCursor cursor_;
};

}  // namespace capstan::data
