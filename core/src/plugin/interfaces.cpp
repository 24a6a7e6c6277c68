// The out-of-line destructors of the interfaces that have no other source file: they put each vtable and type information
// into libcapstan, once, so that casts and catches agree across libraries.
#include <capstan/inference.h>
#include <capstan/plugin.h>
#include <capstan/state.h>
#include <capstan/tokenizer.h>

namespace capstan {

Registrar::~Registrar() = default;
Tokenizer::~Tokenizer() = default;
InferenceEngine::~InferenceEngine() = default;
SequenceState::~SequenceState() = default;

}  // namespace capstan
