// defines: local_values(), cut_over(): how core's layers use parameters of which tensor ranks hold pieces.
#pragma once
#include "mesh/placement.h"
#include "parallel/collectives.h"

#include <capstan/model.h>

#include <string>

namespace capstan::nn {

/// ForwardContext::use(), for those who know what to do with a piece.
inline Tensor local_values(const ForwardContext& context, const Parameter& parameter) {
  return context.grad ? parameter.local() : parameter.local().detach();
}

/// The ranks over which `parameter` is cut; null when it is whole. Error(programming) when the context has other ranks.
inline Communicator* cut_over(const ForwardContext& context, const Parameter& parameter) {
  if (!parameter.cut()) return nullptr;
  Communicator* comm = parallel::tensor_ranks(context);
  const int size = comm == nullptr ? 1 : comm->size();
  if (size != parameter.placement()->size)
    fail(Fault::programming, parameter.name(),
         "it was cut for " + std::to_string(parameter.placement()->size) + " tensor ranks, the forward has " +
             std::to_string(size) + ": run it with the mesh that its engine placed it for");
  return comm;
}

}  // namespace capstan::nn
