// defines: TokenType, IndexedDataset (reader) and IndexedDatasetWriter of token files <prefix>.bin and <prefix>.idx.
//
// The layout is Megatron-LM's indexed dataset, version 1, little-endian. <prefix>.bin is the tokens of all
// sequences back to back. <prefix>.idx is, with N sequences and D - 1 documents:
//
//   0   9 bytes  "MMIDIDX\0\0"          26       u64     D
//   9   u64      version = 1            34       i32[N]  tokens of each sequence
//   17  u8       token type, a code     34+4N    i64[N]  byte offset of each sequence in .bin
//   18  u64      N                      34+12N   i64[D]  first sequence of each document, then N
//
// The i64 arrays are not aligned to 8 bytes.
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan::data {

/// How a token is stored; the values are the codes of the file format.
enum class TokenType : std::uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, u16 = 8 };

CAPSTAN_API std::int64_t size_of(TokenType type);
CAPSTAN_API std::string_view name_of(TokenType type);
/// u16 below 65,500 words, else i32: the rule of the format's own writer.
CAPSTAN_API TokenType token_type_for(std::int64_t vocabulary);

/// A read-only file in memory. An empty file maps to no bytes.
class CAPSTAN_API MappedFile {
 public:
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const unsigned char* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const unsigned char* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// Memory-mapped; every byte of the index is checked when it opens, so later reads cannot leave the files.
/// A document is one or more sequences; its tokens are contiguous. Const members are thread-safe.
class CAPSTAN_API IndexedDataset {
 public:
  /// Opens <prefix>.idx and <prefix>.bin; a missing or damaged file is Error(input) with file, byte offset,
  /// what was expected and what is there.
  explicit IndexedDataset(const std::string& prefix);

  const std::string& prefix() const { return prefix_; }
  TokenType type() const { return type_; }
  std::int64_t sequences() const { return sequences_; }
  std::int64_t documents() const { return documents_; }
  std::int64_t tokens() const { return tokens_; }
  /// Index in the whole token stream of a document's first token; document_begin(documents()) is tokens().
  std::int64_t document_begin(std::int64_t document) const;
  std::int64_t document_length(std::int64_t document) const {
    return document_begin(document + 1) - document_begin(document);
  }
  std::int32_t sequence_length(std::int64_t sequence) const;
  /// Tokens [begin, begin + out.size()) of the whole stream. An id outside [0, vocabulary) is Error(input);
  /// `vocabulary` 0 checks for negative ids only.
  void read(std::int64_t begin, std::span<std::int32_t> out, std::int64_t vocabulary = 0) const;

 private:
  std::int64_t load_i64(std::int64_t offset) const;
  void check_index();
  std::string prefix_;
  MappedFile index_, tokens_file_;
  TokenType type_ = TokenType::u16;
  std::int64_t sequences_ = 0, documents_ = 0, tokens_ = 0;
};

/// Writes a dataset that appears whole or not at all: files grow as <prefix>.*.partial and are renamed, .bin
/// first and .idx last, by finish(). Memory: 4 bytes for each sequence, 8 for each document.
class CAPSTAN_API IndexedDatasetWriter {
 public:
  /// `longest_sequence`: a document of more tokens becomes several sequences (the format counts in i32).
  IndexedDatasetWriter(std::string prefix, TokenType type, std::int32_t longest_sequence = INT32_MAX);
  ~IndexedDatasetWriter();
  /// Adds tokens to the open document; an id that the type cannot hold is Error(input).
  void append(std::span<const std::int32_t> tokens);
  /// Closes the document, which may be empty (then it has one sequence of no tokens).
  void end_document();
  /// Writes everything to the disk and makes it visible. `sidecar`, when not empty, becomes <prefix>.json.
  void finish(const std::string& sidecar = {});

  std::int64_t documents() const;
  std::int64_t tokens() const;
  /// XXH3 (64 bits) of what was written to .bin so far: what `xxhsum -H3` prints of it.
  std::uint64_t digest() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What `data build` notes about a dataset in <prefix>.json. Datasets of other makers have none.
struct CAPSTAN_API Sidecar {
  std::string tokenizer;
  std::int64_t vocabulary = 0, documents = 0, tokens = 0, input_bytes = 0, inputs = 0;
  std::int32_t end_of_document = -1;
  std::string input_digest;  ///< XXH3 over the input pieces' own XXH3, 16 hexadecimal digits
  std::string bin_digest;    ///< XXH3 of the .bin file
  std::vector<std::string> named;  ///< the inputs as they were named, absolute; empty: an older program did not note them
  std::string folder;              ///< where the dataset was built, absolute: `named` may be read relative to it
  std::int64_t max_bytes = 0;      ///< most text to build from; 0: all
  std::string to_json() const;
  /// Reads <prefix>.json; nullopt when there is none; Error(input) when it is damaged or its counts are not
  /// those of `dataset`.
  static std::optional<Sidecar> read(const IndexedDataset& dataset);
  /// The same without a look at the dataset.
  static std::optional<Sidecar> read(const std::string& prefix);
};

/// XXH3 (64 bits) of <prefix>.bin, 16 hexadecimal digits.
CAPSTAN_API std::string bin_digest(const std::string& prefix);

}  // namespace capstan::data
