// Registers itself, and a name that the library "good" has.
#include <capstan/plugin.h>

CAPSTAN_PLUGIN("tokenizer", "registers_taken", "1.0.0") {
  for (const char* name : {"registers_taken", "good"}) {
    registrar.add("tokenizer", name, {}, [](const capstan::Options&, capstan::Registrar&) { return nullptr; });
  }
}
