// A plugin that does all that a plugin may: two registrations, options, and a factory that fails in every way.
#include <capstan/model.h>
#include <capstan/plugin.h>
#include <capstan/tokenizer.h>

#include <new>
#include <string>

namespace {

class Letters : public capstan::Tokenizer {
 public:
  std::string_view name() const override { return "good"; }
  std::int64_t vocabulary() const override { return 26; }
  std::int32_t end_of_document() const override { return -1; }
  void encode(std::string_view text, std::vector<std::int32_t>& out) const override {
    for (char c : text) out.push_back(c - 'a');
  }
  std::string decode(std::span<const std::int32_t>) const override { return ""; }
};

}  // namespace

CAPSTAN_PLUGIN("tokenizer", "good", "1.2.3") {
  using capstan::Fault;
  capstan::Schema schema;
  schema.text("mode", "work", "what the factory does");
  registrar.add("tokenizer", "good", schema, [](const capstan::Options& o, capstan::Registrar&) -> std::shared_ptr<void> {
    const std::string& mode = o.text("mode");
    if (mode == "input") capstan::fail(Fault::input, "good", "the letters are wrong");
    if (mode == "programming") throw capstan::Error(Fault::programming, "a contract is broken");
    if (mode == "memory") throw std::bad_alloc();
    if (mode == "number") throw 42;
    if (mode == "nothing") return nullptr;
    return capstan::as_interface<capstan::Tokenizer>(std::make_shared<Letters>());
  });
  // A second thing in the same library; it makes the first one through the registrar.
  capstan::Schema outer;
  outer.plugin("tokenizer", "inner", "good", "what is made inside");
  registrar.add("tokenizer", "good_outer", outer, [](const capstan::Options& o, capstan::Registrar& r) {
    return capstan::as_interface<capstan::Tokenizer>(r.make_as<capstan::Tokenizer>(o.plugin("inner")));
  });
}
