// Leaves a mark the moment the system loads it.
#include <capstan/plugin.h>
#include <capstan/tokenizer.h>

#include <cstdio>
#include <cstdlib>

__attribute__((constructor)) static void leave_a_mark() {
  if (const char* path = std::getenv("CAPSTAN_TEST_MARK")) {
    if (std::FILE* file = std::fopen(path, "w")) std::fclose(file);
  }
}

CAPSTAN_PLUGIN("tokenizer", "runs_on_load", "1.0.0") {
  capstan::Schema schema;
  schema.integer("pieces", 7, "how many pieces").at_least(1);
  registrar.add("tokenizer", "runs_on_load", schema, [](const capstan::Options&, capstan::Registrar&) { return nullptr; });
}
