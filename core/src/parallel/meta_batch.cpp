#include "parallel/meta_batch.h"

#include "parallel/context_cut.h"
#include "parallel/rows.h"

namespace capstan::parallel {

Batch meta_batch(Device& device, std::int64_t samples, std::int64_t length, int context, int tensor) {
  Space space;
  for (std::int64_t s = 0; s <= samples; ++s) space.host_starts.push_back(static_cast<std::int32_t>(s * length));
  space.capacity = padded_rows(samples * length, tensor), space.longest = length;
  if (context > 1) {
    space.cut = cut_sequences(space.host_starts, samples * length, context, 0, tensor);
    space.host_starts = space.cut->local_starts, space.capacity = space.cut->capacity;
  }
  const std::int64_t rows = space.capacity;
  space.past.assign(static_cast<std::size_t>(samples), 0);
  space.starts = Tensor::empty(Dims{samples + 1}, DType::i32, device);
  space.positions = Tensor::empty(Dims{rows}, DType::i32, device);
  space.sample_ids = Tensor::empty(Dims{rows}, DType::i64, device);
  Batch batch;
  batch.spaces.push_back(std::move(space));
  batch.set("tokens", Tensor::empty(Dims{rows}, DType::i32, device));
  batch.set("targets", Tensor::empty(Dims{rows}, DType::i32, device));
  batch.set("weight", Tensor::empty(Dims{rows}, DType::f32, device));
  batch.step_weight = static_cast<double>(rows);
  return batch;
}

}  // namespace capstan::parallel
