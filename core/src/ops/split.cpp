// split: the pieces of a fused projection as views; the backward writes one gradient in one pass, or none
// when the parts' gradients lie side by side already.
#include <capstan/autograd.h>
#include <capstan/ops.h>

#include <numeric>

namespace capstan::ops {

namespace {
class SplitNode final : public Node {
 public:
  Dims shape;
  std::vector<std::int64_t> widths;
  DType dtype = DType::f32;
  std::shared_ptr<Device> device;
  std::string_view name() const override { return "split"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override {
    if (are_slices_of_one(grads)) return {Tensor::wrap(grads[0].raw(), shape, dtype, *device, grads[0].storage())};
    Tensor whole = Tensor::empty(shape, dtype, *device);
    OpScope scope(*device, "split dx", {0, static_cast<double>(whole.bytes()), static_cast<double>(whole.bytes())});
    std::int64_t at = 0;
    for (std::size_t i = 0; i < widths.size(); at += widths[i++]) {
      const Tensor part = whole.narrow(1, at, widths[i]);
      if (grads[i].defined()) part.copy_from(grads[i]);
      else part.fill(0);
    }
    return {whole};
  }

 private:
  /// The gradients lie side by side in memory, as the parts did: together they are the whole.
  bool are_slices_of_one(std::span<const Tensor> grads) const {
    std::int64_t at = 0;
    for (std::size_t i = 0; i < widths.size(); at += widths[i++]) {
      const Tensor& g = grads[i];
      if (!g.defined() || g.dtype() != dtype || &g.device() != device.get() || g.storage() != grads[0].storage()) return false;
      if (!(g.shape() == Dims{shape[0], widths[i]}) || g.strides()[0] != shape[1] || g.strides()[1] != 1) return false;
      if (!g.is_meta() && static_cast<char*>(g.raw()) != static_cast<char*>(grads[0].raw()) + at * size_of(dtype)) return false;
    }
    return !widths.empty();
  }
};
}  // namespace

std::vector<Tensor> split(const Tensor& a, std::span<const std::int64_t> widths) {
  if (a.rank() != 2 || std::accumulate(widths.begin(), widths.end(), std::int64_t{0}) != a.size(1))
    fail(Fault::programming, "split", "shape: expected [T, C] with widths that add up to C, got " + to_string(a.shape()) + " and " + to_string(Dims(widths)));
  std::vector<Tensor> parts;
  std::int64_t at = 0;
  for (std::int64_t w : widths) parts.push_back(a.narrow(1, at, w)), at += w;
  if (a.requires_grad()) {
    auto node = std::make_shared<SplitNode>();
    node->shape = a.shape(), node->widths.assign(widths.begin(), widths.end());
    node->dtype = a.dtype(), node->device = a.device().shared_from_this();
    const Tensor inputs[] = {a};
    record(node, inputs, parts);
  }
  return parts;
}

}  // namespace capstan::ops
