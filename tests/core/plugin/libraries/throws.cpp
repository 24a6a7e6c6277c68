// Adds one thing, then fails to register.
#include <capstan/plugin.h>

#include <stdexcept>

CAPSTAN_PLUGIN("tokenizer", "throws", "1.0.0") {
  registrar.add("tokenizer", "left_behind", {}, [](const capstan::Options&, capstan::Registrar&) { return nullptr; });
  throw std::runtime_error("no licence found");
}
