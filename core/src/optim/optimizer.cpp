// Optimizer, decays(), is_hidden_matrix(): which parameters decay and which are hidden matrices, by their role and axes.
#include <capstan/optimizer.h>

namespace capstan {

Optimizer::~Optimizer() = default;

bool decays(const Parameter& parameter) {
  if (parameter.spec().dims.size() < 2) return false;  // a gain or a bias, whatever it is called
  switch (parameter.role()) {
    case Role::matrix:
    case Role::embedding:
    case Role::head:
    case Role::router:
    case Role::conv: return true;
    case Role::vector:
    case Role::bias:
    case Role::state: return false;
  }
  return false;
}

bool is_hidden_matrix(const Parameter& parameter) {
  return parameter.role() == Role::matrix && parameter.spec().dims.size() >= 2;
}

}  // namespace capstan
