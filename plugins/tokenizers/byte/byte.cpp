// The byte tokenizer: every byte is a token, so it takes any text and needs no vocabulary file.
#include <capstan/plugin.h>
#include <capstan/tokenizer.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using capstan::Fault;

class ByteTokenizer final : public capstan::Tokenizer {
 public:
  explicit ByteTokenizer(bool end_of_document) : has_end_(end_of_document) {}

  std::string_view name() const override { return "byte"; }
  std::int64_t vocabulary() const override { return has_end_ ? 257 : 256; }
  std::int32_t end_of_document() const override { return has_end_ ? 256 : -1; }
  bool splits_anywhere() const override { return true; }

  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    const std::size_t before = out.size();
    out.resize(before + text.size());
    for (std::size_t i = 0; i < text.size(); ++i) out[before + i] = static_cast<unsigned char>(text[i]);
  }

  // The end of a document is no byte: it decodes to nothing.
  std::string decode(std::span<const std::int32_t> tokens) const override {
    std::string text;
    text.reserve(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] >= 0 && tokens[i] < 256) {
        text.push_back(static_cast<char>(tokens[i]));
      } else if (!has_end_ || tokens[i] != 256) {
        capstan::fail(Fault::input, "byte tokenizer",
                      "token " + std::to_string(i) + ": expected an id of 0 to " + std::to_string(vocabulary() - 1) +
                          ", got " + std::to_string(tokens[i]));
      }
    }
    return text;
  }

 private:
  bool has_end_;
};

}  // namespace

CAPSTAN_PLUGIN("tokenizer", "byte", "1.0.0") {
  capstan::Schema schema;
  schema.flag("end_of_document", true, "a token of its own, 256, after each document (vocabulary 257 instead of 256)");
  registrar.add("tokenizer", "byte", schema, [](const capstan::Options& options, capstan::Registrar&) {
    return capstan::as_interface<capstan::Tokenizer>(std::make_shared<ByteTokenizer>(options.flag("end_of_document")));
  });
}
