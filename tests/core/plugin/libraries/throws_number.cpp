// Fails to register with something that is no exception.
#include <capstan/plugin.h>

CAPSTAN_PLUGIN("tokenizer", "throws_number", "1.0.0") { throw 42; }
