// dropout: the mask is a pure function of its address, so the backward makes it again and keeps nothing.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

struct Mask {
  double p;
  std::uint64_t key, step;
  Tensor sample_ids;
};

Tensor masked(const char* name, const Tensor& x, const Mask& mask) {
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  const std::int64_t rows = x.size(0), cols = rows == 0 ? 0 : x.numel() / rows;
  run(x.device(), name, {real(x.numel()), real(x.bytes()), real(x.bytes())}, [&](Backend& b) {
    b.dropout(num(x), rows, cols, x.raw(), mask.sample_ids.data<std::int64_t>(), mask.p, mask.key, mask.step, y.raw());
  });
  return y;
}

class DropoutNode final : public Node {
 public:
  DropoutNode(Mask mask, DType dtype) : mask_(std::move(mask)), dtype_(dtype) {}
  std::string_view name() const override { return "dropout"; }
  void release() override { mask_.sample_ids = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {masked("dropout dx", incoming(grads[0], dtype_), mask_)};
  }

 private:
  Mask mask_;
  DType dtype_;
};

}  // namespace

Tensor dropout(const Tensor& x, double p, const Rng& rng, const Tensor& sample_ids) {
  check_floating("dropout", "input", x);
  if (!(p >= 0 && p < 1)) wrong("dropout", "probability", "a number in [0, 1)", std::to_string(p));
  if (x.rank() == 0) wrong("dropout", "input's shape", "[T, ...]", to_string(x.shape()));
  check_ids("dropout", "sample_ids", sample_ids, DType::i64, x);
  check_shape("dropout", "sample_ids", sample_ids, Dims{x.size(0)});
  if (p == 0) return x;
  const Mask mask{p, rng.key(), rng.step(), sample_ids.detach().contiguous()};
  Tensor y = masked("dropout", x.detach().contiguous(), mask);
  if (any_requires_grad({&x})) record(std::make_shared<DropoutNode>(mask, x.dtype()), {&x}, {&y});
  return y;
}

}  // namespace capstan::ops
