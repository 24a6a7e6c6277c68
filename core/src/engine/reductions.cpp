// Reductions over flat buffers, by the kernels of the device that holds them.
#include "engine/reductions.h"

#include <kernels/backend.h>

namespace capstan {

namespace {

kernels::Piece piece(const Tensor& flat) { return {static_cast<kernels::Num>(flat.dtype()), flat.raw(), flat.numel()}; }

}  // namespace

double squared_norm(const Tensor& flat) {
  if (flat.is_meta() || flat.numel() == 0) return 0;
  const kernels::Piece pieces[] = {piece(flat)};
  return flat.device().backend().sum_of_squares(pieces);
}

void accumulate(const Tensor& to, const Tensor& from) {
  if (!to.is_meta()) to.device().backend().add(static_cast<kernels::Num>(to.dtype()), to.numel(), to.raw(), from.raw(), to.raw());
}

bool all_finite(const Tensor& flat) {
  if (flat.is_meta() || flat.numel() == 0) return true;
  const kernels::Piece pieces[] = {piece(flat)};
  return flat.device().backend().first_nonfinite(pieces) < 0;
}

}  // namespace capstan
