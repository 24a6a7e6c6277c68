// The tokenizer plugin "@name@": a start to write your own from. Every byte becomes two tokens, its upper and lower half,
// so that 16 tokens spell any text; token 16 ends a document.
#include <capstan/error.h>
#include <capstan/plugin.h>
#include <capstan/tokenizer.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace capstan;

/// Holds nothing that changes: encode and decode are called from several threads.
class @Name@ : public Tokenizer {
 public:
  std::string_view name() const override { return "@name@"; }
  std::int64_t vocabulary() const override { return 17; }
  std::int32_t end_of_document() const override { return 16; }
  bool splits_anywhere() const override { return true; }

  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      out.push_back(byte >> 4);
      out.push_back(byte & 15);
    }
  }

  std::string decode(std::span<const std::int32_t> tokens) const override {
    std::string text;
    int upper = -1;  // the half that waits for its other half
    for (const std::int32_t token : tokens) {
      if (token < 0 || token > 16) {
        fail(Fault::input, "@name@", "expected tokens of 0 to 16, got " + std::to_string(token));
      }
      if (token == 16) upper = -1;
      else if (upper < 0) upper = token;
      else text.push_back(static_cast<char>(upper << 4 | token)), upper = -1;
    }
    return text;
  }
};

}  // namespace

CAPSTAN_PLUGIN("tokenizer", "@name@", "0.1.0") {
  registrar.add("tokenizer", "@name@", Schema(), [](const Options&, Registrar&) {
    return as_interface<Tokenizer>(std::make_shared<@Name@>());
  });
}
