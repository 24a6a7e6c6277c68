// Blending, cutting into microbatches, the prefetch thread, the cursor.
#include "data/loader.h"

#include "data/shuffle.h"

#include <capstan/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

namespace capstan::data {

std::string DataCursor::to_json() const {
  return nlohmann::ordered_json{
      {"sample", sample}, {"counts", counts}, {"sequence_length", sequence_length}, {"tokens", tokens}}
      .dump();
}

DataCursor DataCursor::from_json(const std::string& text, const std::string& where) {
  DataCursor c;
  try {
    const auto j = nlohmann::json::parse(text);
    j.at("sample").get_to(c.sample);
    j.at("counts").get_to(c.counts);
    j.at("sequence_length").get_to(c.sequence_length);
    j.at("tokens").get_to(c.tokens);
  } catch (const nlohmann::json::exception& e) {
    fail(Fault::input, where, fmt::format("the data's cursor is damaged: {}; resume from another checkpoint", e.what()));
  }
  return c;
}

namespace {

/// The set that lags its weight most when `sample` samples are out; sets with `open[d]` false take no part.
std::size_t most_behind(const std::vector<double>& weights, const std::vector<std::int64_t>& counts, std::int64_t sample,
                        const std::vector<char>* open = nullptr) {
  std::size_t best = weights.size();
  double most = 0;
  for (std::size_t d = 0; d < weights.size(); ++d) {
    if (open != nullptr && !(*open)[d]) continue;
    const double lag = weights[d] * static_cast<double>(std::max<std::int64_t>(sample, 1)) - static_cast<double>(counts[d]);
    if (best == weights.size() || lag > most) best = d, most = lag;
  }
  return best;
}

double weight_of(const std::vector<HostBatch>& batches) {
  double sum = 0;
  for (const auto& batch : batches) sum = std::accumulate(batch.rows.weight.begin(), batch.rows.weight.end(), sum);
  return sum;
}

Batch to_batch(HostBatch host, std::int64_t sequence_length, double step_weight, Device& device) {
  const auto used = static_cast<std::int32_t>(host.rows.tokens.size());
  const std::int64_t capacity = host.samples * sequence_length;
  Space space;
  space.capacity = capacity, space.longest = sequence_length;
  space.host_starts = std::move(host.rows.starts);
  space.past.assign(space.host_starts.size(), 0);
  space.host_starts.push_back(used);
  // Rows of the dead sequence: token 0, no target, weight 0.
  const auto rows = static_cast<std::size_t>(capacity);
  host.rows.tokens.resize(rows, 0), host.rows.targets.resize(rows, -1), host.rows.weight.resize(rows, 0.0f);
  host.rows.sample_ids.resize(rows, 0);
  std::vector<std::int32_t> positions(rows, 0);
  for (std::size_t s = 0; s + 1 < space.host_starts.size(); ++s) {
    const auto begin = positions.begin() + space.host_starts[s], end = positions.begin() + space.host_starts[s + 1];
    std::iota(begin, end, 0);
  }
  const auto tensor = [&]<class T>(const std::vector<T>& values) {
    return Tensor::of(std::span<const T>(values), Dims{static_cast<std::int64_t>(values.size())}, device);
  };
  space.starts = tensor(space.host_starts);
  space.positions = tensor(positions);
  space.sample_ids = tensor(host.rows.sample_ids);
  Batch batch;
  batch.own_weight = std::accumulate(host.rows.weight.begin(), host.rows.weight.end(), 0.0);
  batch.spaces.push_back(std::move(space));
  batch.set("tokens", tensor(host.rows.tokens));
  batch.set("targets", tensor(host.rows.targets));
  batch.set("weight", tensor(host.rows.weight));
  batch.step_weight = step_weight;
  return batch;
}

std::string place_of(const DataOptions& o, const std::string& name) { return o.where ? o.where(name) : name; }

void check(const DataOptions& o) {
  const auto at_least = [&](const char* name, std::int64_t value, std::int64_t low) {
    if (value < low) fail(Fault::input, place_of(o, name), fmt::format("expected {} or more, got {}", low, value));
  };
  if (o.sets.empty()) fail(Fault::input, place_of(o, "sets"), "no dataset is named; `capstan data build` makes one from text files");
  at_least("sequence_length", o.sequence_length, 1);
  at_least("batch_size", o.batch_size, 1);
  at_least("micro_batch", o.micro_batch, 1);
  at_least("prefetch", o.prefetch, 0);
  if (o.ranks < 1 || o.rank < 0 || o.rank >= o.ranks || (o.ranks > 1 && !o.sum_over_ranks))
    fail(Fault::programming, "data", fmt::format("rank {} of {}", o.rank, o.ranks));
  if (o.sequence_length > INT32_MAX / std::min(o.micro_batch, o.batch_size)) {
    fail(Fault::input, place_of(o, "micro_batch"),
         fmt::format("{} samples of {} tokens are more than 2^31 rows; use a smaller micro_batch",
                     std::min(o.micro_batch, o.batch_size), o.sequence_length));
  }
  for (const auto& set : o.sets) {
    if (!(set.weight > 0) || !std::isfinite(set.weight)) {
      fail(Fault::input, set.prefix,
           fmt::format("weight: expected a number above 0, got {}; leave the set out", set.weight));
    }
  }
}

void check_tokenizer(const IndexedDataset& dataset, const TokenizerIdentity& tokenizer) {
  const auto sidecar = Sidecar::read(dataset);
  if (!sidecar) return;  // another maker's dataset: its ids are checked against the vocabulary as they are read
  if (sidecar->tokenizer != tokenizer.name || sidecar->vocabulary != tokenizer.vocabulary) {
    fail(Fault::input, dataset.prefix(),
         fmt::format(
             "the dataset was built with tokenizer '{}' ({} words), the recipe names '{}' ({} words); build it again with "
             "--tokenizer {}, or change the recipe",
             sidecar->tokenizer, sidecar->vocabulary, tokenizer.name, tokenizer.vocabulary, tokenizer.name));
  }
}

}  // namespace

struct DataSource::Impl {
  struct Step {
    std::vector<HostBatch> batches;
    DataCursor after;
  };

  Impl(DataOptions o, TokenizerIdentity t, std::shared_ptr<Device> d)
      : options(std::move(o)), tokenizer(std::move(t)), device(std::move(d)) {
    check(options);
    double sum = 0;
    for (const auto& set : options.sets) sum += set.weight;
    for (std::size_t i = 0; i < options.sets.size(); ++i) {
      const DataSet& set = options.sets[i];
      weights.push_back(set.weight / sum);
      const auto dataset = std::make_shared<const IndexedDataset>(set.prefix);
      check_tokenizer(*dataset, tokenizer);
      DocumentSplit split = DocumentSplit::make(*dataset, options.validation);
      TokenStream::Settings settings;
      settings.seed = options.seed, settings.name = fmt::format("{}", i);
      settings.across = options.attend_across_documents, settings.vocabulary = tokenizer.vocabulary;
      train.emplace_back(dataset, std::move(split.train), settings);
      if (train.back().tokens() <= options.sequence_length) {
        fail(Fault::input, set.prefix,
             fmt::format("{} training tokens in {} documents are too few: one sample needs {}; add text, or shorten "
                         "sequence_length",
                         train.back().tokens(), train.back().documents().size(), options.sequence_length + 1));
      }
      if (!split.validation.empty()) {
        // Fixed whatever the seed: runs with other seeds are compared on the same text.
        settings.seed = 0, settings.name = fmt::format("validation.{}", i), settings.endless = false;
        validation.emplace_back(dataset, std::move(split.validation), settings);
      }
      at.counts.push_back(0), at.tokens.push_back(train.back().tokens());
    }
    at.sequence_length = options.sequence_length;
  }

  /// Which piece of its stream is a set's sample k: neighbours come from one document, and a batch should not, so the
  /// samples of about an epoch are shuffled among themselves.
  std::int64_t place(std::size_t set, std::int64_t k) const {
    const std::int64_t period = train[set].tokens() / options.sequence_length, block = k / period;
    const Rng rng(options.seed, fmt::format("data.samples.{}", set), static_cast<std::uint64_t>(block));
    return block * period + shuffled(rng, period, k % period);
  }

  Step make_step() {
    Step step;
    DataCursor now = at;  // `at` stays where it was when a read fails
    for (std::int64_t done = 0; done < options.batch_size;) {
      const std::int64_t all = std::min(options.micro_batch * options.ranks, options.batch_size - done);
      const std::int64_t begin = all * options.rank / options.ranks, end = all * (options.rank + 1) / options.ranks;
      HostBatch batch;
      batch.samples = std::max<std::int64_t>(end - begin, 1);
      for (std::int64_t s = 0; s < all; ++s) {
        const std::size_t set = most_behind(weights, now.counts, now.sample);
        if (s >= begin && s < end)
          train[set].append(place(set, now.counts[set]) * options.sequence_length, options.sequence_length,
                            now.sample * options.sequence_length, batch.rows);
        ++now.counts[set], ++now.sample;
      }
      done += all;
      step.batches.push_back(std::move(batch));
    }
    step.after = at = std::move(now);
    return step;
  }

  void start() {
    stopping = false;
    thread = std::thread([this] {
      try {
        for (;;) {
          {
            std::unique_lock lock(mutex);
            space.wait(lock, [&] { return stopping || queue.size() < static_cast<std::size_t>(options.prefetch); });
            if (stopping) return;
          }
          Step step = make_step();
          const std::lock_guard lock(mutex);
          queue.push_back(std::move(step));
          ready.notify_one();
        }
      } catch (...) {
        const std::lock_guard lock(mutex);
        error = std::current_exception();
        ready.notify_one();
      }
    });
  }

  void stop() {
    if (!thread.joinable()) return;
    {
      const std::lock_guard lock(mutex);
      stopping = true;
    }
    space.notify_one();
    thread.join();
  }

  Step take() {
    if (options.prefetch == 0) return make_step();
    if (!thread.joinable()) start();
    std::unique_lock lock(mutex);
    ready.wait(lock, [&] { return !queue.empty() || error; });
    if (queue.empty()) std::rethrow_exception(error);
    Step step = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    space.notify_one();
    return step;
  }

  std::vector<Batch> to_batches(std::vector<HostBatch> host, const char* what) const {
    double weight = weight_of(host);
    if (options.ranks > 1) weight = options.sum_over_ranks(weight);
    if (!(weight > 0)) {
      fail(Fault::input, place_of(options, "attend_across_documents"),
           fmt::format("no row of this {} has a target, since every document in it is a single token: set it to true, or build the "
                       "sets again with larger documents",
                       what));
    }
    std::vector<Batch> batches;
    for (auto& batch : host) batches.push_back(to_batch(std::move(batch), options.sequence_length, weight, *device));
    return batches;
  }

  DataOptions options;
  TokenizerIdentity tokenizer;
  std::shared_ptr<Device> device;
  std::vector<double> weights;  // sum to 1
  std::vector<TokenStream> train, validation;
  DataCursor at;  // of make_step(), ahead of what was handed out

  std::mutex mutex;  // of what follows
  std::condition_variable space, ready;
  std::deque<Step> queue;  // host memory only: the device's pool belongs to the caller's thread
  std::exception_ptr error;
  bool stopping = false;
  std::thread thread;
};

DataSource::DataSource(DataOptions options, TokenizerIdentity tokenizer, std::shared_ptr<Device> device)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(tokenizer), std::move(device))), cursor_(impl_->at) {}

DataSource::~DataSource() { impl_->stop(); }

std::vector<Batch> DataSource::next() {
  Impl::Step step = impl_->take();
  std::vector<Batch> batches = impl_->to_batches(std::move(step.batches), "batch");
  cursor_ = std::move(step.after);
  return batches;
}

void DataSource::seek(const DataCursor& cursor, const std::string& where) {
  const DataOptions& o = impl_->options;
  const auto differs = [&](const char* name, const std::string& what) {
    fail(Fault::input, place_of(o, name), what + "; resume with the data that the run began with, or start a new run");
  };
  const auto damaged = [&](const std::string& what) { fail(Fault::input, where, "the data's cursor is damaged: " + what + "; resume from another checkpoint"); };
  if (cursor.sequence_length != o.sequence_length) {
    differs("sequence_length", fmt::format("the run has trained on sequences of another length: expected {}, as its checkpoint has, got {}",
                                           cursor.sequence_length, o.sequence_length));
  }
  if (cursor.counts.size() != impl_->train.size() || cursor.tokens.size() != impl_->train.size()) {
    differs("sets", fmt::format("the run has trained on another number of datasets: expected {}, as its checkpoint has, got {}",
                                cursor.counts.size(), impl_->train.size()));
  }
  for (std::size_t i = 0; i < cursor.tokens.size(); ++i) {
    if (cursor.tokens[i] != impl_->train[i].tokens()) {
      differs("sets", fmt::format("the run has trained on another {} or with another share for validation: expected {} training tokens, as "
                                  "its checkpoint has, got {}",
                                  o.sets[i].prefix, cursor.tokens[i], impl_->train[i].tokens()));
    }
  }
  // Counts may not exceed what keeps row numbers in 63 bits; their sum is then safe too.
  const std::int64_t limit =
      INT64_MAX / 2 / (o.sequence_length * static_cast<std::int64_t>(cursor.counts.size()));
  std::int64_t sum = 0;
  for (const std::int64_t count : cursor.counts) {
    if (count < 0 || count > limit) damaged(fmt::format("a set's count is {}", count));
    sum += count;
  }
  if (sum != cursor.sample) damaged(fmt::format("{} samples, but the sets' counts add up to {}", cursor.sample, sum));
  impl_->stop();
  impl_->queue.clear();
  impl_->error = nullptr;
  impl_->at = cursor;
  cursor_ = cursor;
}

std::vector<HostBatch> DataSource::host_validation(std::int64_t samples) {
  Impl& m = *impl_;
  const std::int64_t length = m.options.sequence_length;
  std::vector<double> weights;
  std::vector<std::int64_t> counts(m.validation.size(), 0);
  std::vector<char> open(m.validation.size(), 1);
  for (std::size_t i = 0; i < m.validation.size(); ++i) weights.push_back(m.weights[i]);
  std::vector<HostBatch> result;
  for (std::int64_t sample = 0; sample < samples; ++sample) {
    const std::size_t set = most_behind(weights, counts, sample, &open);
    if (set == weights.size()) break;
    if (sample % m.options.micro_batch == 0) result.emplace_back().samples = m.options.micro_batch;
    // Shuffled too: the first batches are then a fair sample of all the documents.
    const std::int64_t tokens = m.validation[set].tokens(), pieces = (tokens + length - 1) / length;
    const std::int64_t whole = tokens / length, k = counts[set];  // a part of a sample stays last
    const std::int64_t first = (k < whole ? shuffled(Rng(0, fmt::format("data.samples.validation.{}", set)), whole, k) : k) * length;
    m.validation[set].append(first, std::min(length, tokens - first), sample * length, result.back().rows);
    open[set] = ++counts[set] < pieces;
  }
  return result;
}

std::vector<Batch> DataSource::validation(std::int64_t samples) {
  if (impl_->validation.empty() || samples <= 0) return {};
  const DataOptions& o = impl_->options;
  std::vector<HostBatch> all = host_validation(samples), mine;
  for (std::size_t first = 0; first < all.size(); first += static_cast<std::size_t>(o.ranks)) {
    const std::size_t b = first + static_cast<std::size_t>(o.rank);
    if (b < all.size()) mine.push_back(std::move(all[b]));
    else mine.emplace_back().samples = o.micro_batch;
  }
  return impl_->to_batches(std::move(mine), "validation");
}

std::int64_t DataSource::validation_samples() const {
  const std::int64_t length = impl_->options.sequence_length;
  std::int64_t samples = 0;
  for (const auto& stream : impl_->validation) samples += (stream.tokens() + length - 1) / length;
  return samples;
}

namespace {

std::int64_t tokens_of(const std::vector<TokenStream>& streams) {
  std::int64_t sum = 0;
  for (const auto& stream : streams) sum += stream.tokens();
  return sum;
}

std::int64_t documents_of(const std::vector<TokenStream>& streams) {
  std::int64_t sum = 0;
  for (const auto& stream : streams) sum += static_cast<std::int64_t>(stream.documents().size());
  return sum;
}

std::string grouped(std::int64_t n) {
  std::string digits = std::to_string(n);
  for (auto at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<std::size_t>(at), ",");
  }
  return digits;
}

}  // namespace

std::int64_t DataSource::train_tokens() const { return tokens_of(impl_->train); }
std::int64_t DataSource::validation_tokens() const { return tokens_of(impl_->validation); }
std::int64_t DataSource::train_documents() const { return documents_of(impl_->train); }
std::int64_t DataSource::validation_documents() const { return documents_of(impl_->validation); }

std::string DataSource::describe() const {
  const std::size_t sets = impl_->train.size();
  std::string text = sets == 1 ? impl_->options.sets[0].prefix : fmt::format("{} sets", sets);
  text += fmt::format(": {} tokens in {} documents", grouped(train_tokens()), grouped(train_documents()));
  if (!impl_->validation.empty()) {
    text += fmt::format(", {} more in {} for validation", grouped(validation_tokens()), grouped(validation_documents()));
  }
  return text;
}

const DataOptions& DataSource::options() const { return impl_->options; }
const TokenizerIdentity& DataSource::tokenizer() const { return impl_->tokenizer; }
std::span<const TokenStream> DataSource::train_streams() const { return impl_->train; }

}  // namespace capstan::data
