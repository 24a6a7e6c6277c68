// Uses a function that this core does not have.
#include <capstan/plugin.h>

namespace capstan {
void function_of_a_later_core(int);
}

CAPSTAN_PLUGIN("tokenizer", "undefined_symbol", "1.0.0") { capstan::function_of_a_later_core(1); }
