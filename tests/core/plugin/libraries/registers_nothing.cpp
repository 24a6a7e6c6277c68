// Says to be a tokenizer but registers none.
#include <capstan/plugin.h>

CAPSTAN_PLUGIN("tokenizer", "registers_nothing", "1.0.0") {}
