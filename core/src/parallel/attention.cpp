// Attention over sequences that context ranks share.
#include "parallel/attention.h"

#include <capstan/error.h>

namespace capstan::parallel {

Tensor attention(const Tensor&, const Tensor&, const Tensor&, const Space& space, const ops::AttentionShape&, Communicator& comm) {
  fail(Fault::input, "attention", "sequences of " + std::to_string(space.sequences()) + " shared by the ranks of " + comm.name() + ": train with context: 1");
}

}  // namespace capstan::parallel
