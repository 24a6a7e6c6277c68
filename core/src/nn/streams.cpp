// What layers do to rows: which are this rank's, dropout by address, attention wherever the keys are.
#include "nn/local.h"
#include "parallel/attention.h"
#include "parallel/context_cut.h"

#include <capstan/nn.h>

#include <string>

namespace capstan::nn {

Tensor stream_rows(const ForwardContext& context, const Tensor& all) {
  const Communicator* comm = parallel::tensor_ranks(context);
  if (comm == nullptr) return all;
  const std::int64_t rows = all.size(0);
  if (rows % comm->size() != 0)
    fail(Fault::programming, "rows",
         "expected a batch whose rows are a multiple of the " + std::to_string(comm->size()) + " tensor ranks, got " +
             std::to_string(rows) + ": pad it with rows of the dead sequence");
  return all.detach().narrow(0, rows / comm->size() * comm->rank(), rows / comm->size());
}

Tensor take_rows(ForwardContext& context, const Tensor& h, const Tensor& rows) {
  Communicator* comm = parallel::tensor_ranks(context);
  return ops::gather(comm == nullptr ? h : parallel::gather_rows(h, *comm), rows);
}

Tensor dropout(ForwardContext& context, const Tensor& x, double p, std::string_view name) {
  if (p == 0 || !context.training) return x;
  return ops::dropout(x, p, context.random(name), stream_rows(context, context.batch.space().sample_ids));
}

Tensor attention(ForwardContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                 const ops::AttentionShape& shape) {
  const Space& space = context.batch.space();
  ops::AttentionShape here = shape;
  if (parallel::tensor_ranks(context) == nullptr && space.cut == nullptr) return ops::attention(q, k, v, space, shape);
  if (q.rank() != 2 || k.rank() != 2 || q.size(1) % shape.head_size != 0 || k.size(1) % shape.head_size != 0)
    fail(Fault::programming, "attention",
         "q and k: expected [T, heads * " + std::to_string(shape.head_size) + "], got " + to_string(q.shape()) + " and " +
             to_string(k.shape()));
  here.heads = q.size(1) / shape.head_size, here.kv_heads = k.size(1) / shape.head_size;
  if (space.cut == nullptr) return ops::attention(q, k, v, space, here);
  Communicator* comm = parallel::context_ranks(context);
  if (comm == nullptr || comm->size() != space.cut->size)
    fail(Fault::programming, "attention",
         "the batch was cut over " + std::to_string(space.cut->size) + " context ranks, the forward has " +
             std::to_string(comm == nullptr ? 1 : comm->size()));
  return parallel::attention(q, k, v, space, here, *comm);
}

}  // namespace capstan::nn
