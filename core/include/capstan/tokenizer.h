// defines: Tokenizer, the interface of plugin kind "tokenizer".
#pragma once
#include <capstan/export.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capstan {

/// Thread-safe: encode and decode are called from several threads.
class CAPSTAN_API Tokenizer {
 public:
  virtual ~Tokenizer();
  virtual std::string_view name() const = 0;
  virtual std::int64_t vocabulary() const = 0;
  /// Ends a document; -1 when the tokenizer has none.
  virtual std::int32_t end_of_document() const = 0;
  virtual void encode(std::string_view text, std::vector<std::int32_t>& out) const = 0;
  /// The bytes of `tokens`; unknown ids are Error(input).
  virtual std::string decode(std::span<const std::int32_t> tokens) const = 0;
  /// Whether encoding a text in pieces, cut at any bytes, gives the same tokens as encoding it whole: then
  /// documents of any size are built in bounded memory.
  virtual bool splits_anywhere() const;
};

}  // namespace capstan
