// The writer of .bin/.idx datasets and their .json sidecar.
#include <capstan/error.h>
#include <fmt/format.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "data/index_layout.h"
#include "data/indexed_dataset.h"
#include "data/output_file.h"

namespace capstan::data {

struct IndexedDatasetWriter::Impl {
  Impl(std::string p, TokenType t, std::int32_t longest)
      : prefix(std::move(p)),
        type(t),
        longest_sequence(longest),
        bin(prefix + ".bin"),
        index(prefix + ".idx"),
        hash(XXH3_createState(), XXH3_freeState) {
    if (longest < 1) fail(Fault::programming, "IndexedDatasetWriter", "longest_sequence must be at least 1");
    XXH3_64bits_reset(hash.get());
  }

  template <class T>
  void append_as(std::span<const std::int32_t> tokens) {
    std::vector<T> values(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (static_cast<std::int64_t>(tokens[i]) > static_cast<std::int64_t>(std::numeric_limits<T>::max()) ||
          static_cast<std::int64_t>(tokens[i]) < static_cast<std::int64_t>(std::numeric_limits<T>::min())) {
        fail(Fault::input, prefix, fmt::format("token {} does not fit the dataset's type {}", tokens[i], name_of(type)));
      }
      values[i] = static_cast<T>(tokens[i]);
    }
    XXH3_64bits_update(hash.get(), values.data(), values.size() * sizeof(T));
    bin.write(std::span<const T>(values));
  }

  void end_sequence() { lengths.push_back(static_cast<std::int32_t>(std::exchange(open_sequence, 0))); }

  std::string prefix;
  TokenType type;
  std::int32_t longest_sequence;
  OutputFile bin, index;
  std::vector<std::int32_t> lengths;
  std::vector<std::int64_t> boundaries{0};
  std::int64_t open_sequence = 0, tokens = 0;
  bool document_open = false;
  std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> hash;
};

IndexedDatasetWriter::IndexedDatasetWriter(std::string prefix, TokenType type, std::int32_t longest_sequence)
    : impl_(std::make_unique<Impl>(std::move(prefix), type, longest_sequence)) {}

IndexedDatasetWriter::~IndexedDatasetWriter() = default;

void IndexedDatasetWriter::append(std::span<const std::int32_t> tokens) {
  Impl& w = *impl_;
  w.document_open = true;
  w.tokens += static_cast<std::int64_t>(tokens.size());
  while (!tokens.empty()) {
    if (w.open_sequence == w.longest_sequence) w.end_sequence();
    const std::size_t n = std::min(tokens.size(), static_cast<std::size_t>(w.longest_sequence - w.open_sequence));
    const auto part = tokens.first(n);
    switch (w.type) {
      case TokenType::u8:
        w.append_as<std::uint8_t>(part);
        break;
      case TokenType::i8:
        w.append_as<std::int8_t>(part);
        break;
      case TokenType::i16:
        w.append_as<std::int16_t>(part);
        break;
      case TokenType::u16:
        w.append_as<std::uint16_t>(part);
        break;
      case TokenType::i32:
        w.append_as<std::int32_t>(part);
        break;
      case TokenType::i64:
        w.append_as<std::int64_t>(part);
        break;
    }
    w.open_sequence += static_cast<std::int64_t>(n);
    tokens = tokens.subspan(n);
  }
}

void IndexedDatasetWriter::end_document() {
  impl_->end_sequence();
  impl_->boundaries.push_back(static_cast<std::int64_t>(impl_->lengths.size()));
  impl_->document_open = false;
}

std::int64_t IndexedDatasetWriter::documents() const { return static_cast<std::int64_t>(impl_->boundaries.size()) - 1; }
std::int64_t IndexedDatasetWriter::tokens() const { return impl_->tokens; }
std::uint64_t IndexedDatasetWriter::digest() const { return XXH3_64bits_digest(impl_->hash.get()); }

void IndexedDatasetWriter::finish(const std::string& sidecar) {
  Impl& w = *impl_;
  if (w.document_open) fail(Fault::programming, w.prefix, "finish() with a document still open");
  const std::uint64_t version = 1, sequences = w.lengths.size(), entries = w.boundaries.size();
  w.index.write(layout::magic, sizeof layout::magic);
  w.index.write(&version, 8);
  w.index.write(&w.type, 1);
  w.index.write(&sequences, 8);
  w.index.write(&entries, 8);
  w.index.write(std::span<const std::int32_t>(w.lengths));
  std::int64_t offset = 0;
  for (const std::int32_t length : w.lengths) {
    w.index.write(&offset, 8);
    offset += length * size_of(w.type);
  }
  w.index.write(std::span<const std::int64_t>(w.boundaries));

  std::unique_ptr<OutputFile> json;
  if (!sidecar.empty()) {
    json = std::make_unique<OutputFile>(w.prefix + ".json");
    json->write(sidecar.data(), sidecar.size());
    json->sync();
  }
  w.bin.sync();
  w.index.sync();
  // From here a dataset that this one replaces is gone; without .idx no half of either is taken for a whole.
  std::error_code error;
  std::filesystem::remove(w.index.path(), error);
  if (error) {
    fail(Fault::input, w.index.path(),
         fmt::format("the old index cannot be removed: {}; nothing was changed", error.message()));
  }
  try {
    if (!json) ::unlink((w.prefix + ".json").c_str());
    sync_folder_of(w.prefix);
    w.bin.commit();
    if (json) json->commit();
    sync_folder_of(w.prefix);
    w.index.commit();
    sync_folder_of(w.prefix);
  } catch (...) {
    // What is in place is half a dataset, or one that may not last: it would only block the next build.
    for (const char* suffix : {".idx", ".bin", ".json"}) ::unlink((w.prefix + suffix).c_str());
    throw;
  }
}

std::string bin_digest(const std::string& prefix) {
  const MappedFile file(prefix + ".bin");
  return fmt::format("{:016x}", XXH3_64bits(file.data(), static_cast<std::size_t>(file.bytes())));
}

std::string Sidecar::to_json() const {
  const nlohmann::ordered_json j = {
      {"format", "capstan dataset"},
      {"version", 1},
      {"tokenizer", {{"name", tokenizer}, {"vocabulary", vocabulary}, {"end_of_document", end_of_document}}},
      {"documents", documents},
      {"tokens", tokens},
      {"inputs",
       {{"count", inputs}, {"bytes", input_bytes}, {"xxh3", input_digest}, {"named", named}, {"folder", folder}, {"max_bytes", max_bytes}}},
      {"bin_xxh3", bin_digest},
  };
  return j.dump(2) + "\n";
}

std::optional<Sidecar> Sidecar::read(const std::string& prefix) {
  const std::string path = prefix + ".json";
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) fail(Fault::input, path, fmt::format("cannot read the file: {}", std::strerror(errno)));
  Sidecar s;
  try {
    const auto j = nlohmann::json::parse(text.str());
    if (j.at("format") != "capstan dataset") fail(Fault::input, path, "not a note of `capstan data build`; rename the file");
    if (j.at("version") != 1) {
      fail(Fault::input, path, fmt::format("version: expected 1, got {}; a newer program wrote it", j.at("version").dump()));
    }
    const auto& tokenizer = j.at("tokenizer");
    s.tokenizer = tokenizer.at("name"), s.vocabulary = tokenizer.at("vocabulary");
    s.end_of_document = tokenizer.at("end_of_document");
    s.documents = j.at("documents"), s.tokens = j.at("tokens");
    const auto& inputs = j.at("inputs");
    s.inputs = inputs.at("count"), s.input_bytes = inputs.at("bytes"), s.input_digest = inputs.at("xxh3");
    s.bin_digest = j.at("bin_xxh3");
    if (inputs.contains("named")) {
      inputs.at("named").get_to(s.named);
      s.folder = inputs.at("folder"), s.max_bytes = inputs.at("max_bytes");
    }
  } catch (const nlohmann::json::exception& e) {
    fail(Fault::input, path, fmt::format("damaged: {}; build the dataset again", e.what()));
  }
  return s;
}

std::optional<Sidecar> Sidecar::read(const IndexedDataset& dataset) {
  const std::optional<Sidecar> s = read(dataset.prefix());
  if (s && (s->documents != dataset.documents() || s->tokens != dataset.tokens())) {
    fail(Fault::input, dataset.prefix() + ".json",
         fmt::format("belongs to another dataset: expected {} documents and {} tokens, as the .idx file has, got {} and {}; "
                     "copy all three files together or build again",
                     dataset.documents(), dataset.tokens(), s->documents, s->tokens));
  }
  return s;
}

}  // namespace capstan::data
