// Rows of the dead sequence, so that tensor ranks hold equally many.
#include "parallel/rows.h"

namespace capstan::parallel {

namespace {

Tensor padded(const Tensor& t, std::int64_t rows, double value) {
  Dims shape = t.shape();
  shape[0] = rows;
  Tensor longer = Tensor::empty(shape, t.dtype(), t.device());
  longer.narrow(0, 0, t.size(0)).copy_from(t);
  longer.narrow(0, t.size(0), rows - t.size(0)).fill(value);
  return longer;
}

}  // namespace

Batch pad_rows(const Batch& batch, int tensor_ranks) {
  Batch result = batch;
  for (Space& space : result.spaces) {
    const std::int64_t before = space.capacity, rows = padded_rows(before, tensor_ranks);
    if (rows == before) continue;
    space.capacity = rows;
    space.positions = padded(space.positions, rows, 0);
    space.sample_ids = padded(space.sample_ids, rows, 0);
    if (space.name != "text") continue;  // the streams are its own
    for (const auto& [name, value] : batch.streams())
      if (value.rank() > 0 && value.size(0) == before) result.set(name, padded(value, rows, name == "targets" ? -1 : 0));
  }
  return result;
}

}  // namespace capstan::parallel
