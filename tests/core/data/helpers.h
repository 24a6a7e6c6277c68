// defines: what the data tests share: a folder of their own, files, tokenizers, datasets, the text of an Error.
#pragma once
#include <capstan/error.h>
#include <capstan/tokenizer.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "data/indexed_dataset.h"

namespace capstan::data {

class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "capstan_data_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The message of the Error(fault) that `f` must throw.
template <class F>
std::string error_of(Fault fault, F&& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(static_cast<int>(e.fault()), static_cast<int>(fault)) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

/// Bytes, with 256 at the end of a document; may be cut anywhere.
class ByteTokens final : public Tokenizer {
 public:
  std::string_view name() const override { return "test-bytes"; }
  std::int64_t vocabulary() const override { return 257; }
  std::int32_t end_of_document() const override { return 256; }
  bool splits_anywhere() const override { return true; }
  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    for (const char c : text) out.push_back(static_cast<unsigned char>(c));
  }
  std::string decode(std::span<const std::int32_t>) const override { return {}; }
};

/// The length of each word; a word that is cut gives other tokens. No end-of-document token.
class WordLengths final : public Tokenizer {
 public:
  std::string_view name() const override { return "test-words"; }
  std::int64_t vocabulary() const override { return 70000; }
  std::int32_t end_of_document() const override { return -1; }
  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    std::istringstream words{std::string(text)};
    for (std::string word; words >> word;) out.push_back(static_cast<std::int32_t>(word.size()));
  }
  std::string decode(std::span<const std::int32_t>) const override { return {}; }
};

using Documents = std::vector<std::vector<std::int32_t>>;

inline void write_dataset(const std::string& prefix, const Documents& documents, TokenType type = TokenType::i32) {
  IndexedDatasetWriter writer(prefix, type);
  for (const auto& document : documents) {
    writer.append(document);
    writer.end_document();
  }
  writer.finish();
}

inline Documents read_dataset(const IndexedDataset& dataset) {
  Documents documents;
  for (std::int64_t d = 0; d < dataset.documents(); ++d) {
    documents.emplace_back(static_cast<std::size_t>(dataset.document_length(d)));
    dataset.read(dataset.document_begin(d), documents.back());
  }
  return documents;
}

}  // namespace capstan::data
