// Scores and logits over a vocabulary that tensor ranks may share.
#include "parallel/vocabulary.h"
#include "nn/local.h"

#include <capstan/nn.h>

#include <cstdint>
#include <vector>

namespace capstan::nn {

Score score(ForwardContext& context, const Tensor& x, const Parameter& weight, const Tensor& targets, const Tensor* weights,
            Tensor* objective) {
  const Tensor w = local_values(context, weight);
  Communicator* comm = cut_over(context, weight);
  ops::HeadScore s;
  if (comm != nullptr) {
    s = parallel::vocab_cross_entropy(x, w, targets, weights, context.grad, weight.placement()->runs[0].begin,
                                      weight.shape()[0], *comm);
  } else {
    const Tensor mine = weights == nullptr ? Tensor() : stream_rows(context, *weights);
    s = ops::linear_cross_entropy(x, w, stream_rows(context, targets), weights == nullptr ? nullptr : &mine, context.grad);
  }
  if (objective != nullptr) *objective = s.objective;
  return {s.logprob, s.logsumexp, s.entropy};
}

Tensor logits(ForwardContext& context, const Tensor& x, const Parameter& weight) {
  const Tensor w = local_values(context, weight);
  Communicator* comm = cut_over(context, weight);
  if (comm == nullptr) return ops::linear(x, w);
  std::vector<std::int64_t> widths;
  for (int r = 0; r < comm->size(); ++r) widths.push_back(place_tensor(weight, comm->size(), r).local[0]);
  return parallel::gather_columns(ops::linear(x, w), widths, *comm);
}

}  // namespace capstan::nn
