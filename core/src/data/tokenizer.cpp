// What the interface Tokenizer answers for tokenizers that say nothing else.
#include <capstan/tokenizer.h>

namespace capstan {

bool Tokenizer::splits_anywhere() const { return false; }

}  // namespace capstan
