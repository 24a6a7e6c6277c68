// rope_table and rope. The backward turns the gradient back by the same table.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

// Rows may be apart (a slice of a fused projection); within a row the heads are adjacent.
bool rows_readable(const Tensor& x) {
  std::int64_t step = 1;
  for (int i = x.rank() - 1; i > 0; --i) {
    if (x.shape()[i] != 1 && x.strides()[i] != step) return false;
    step *= x.shape()[i];
  }
  return true;
}

Tensor turn(const Tensor& x, const Tensor& table, bool inverse) {
  const Tensor in = rows_readable(x) ? x.detach() : x.detach().contiguous();
  const std::int64_t rows = x.size(0), size = table.size(1), heads = rows == 0 ? 0 : x.numel() / rows / size;
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  run(x.device(), inverse ? "rope dx" : "rope", {3 * real(x.numel()), real(x.bytes() + table.bytes()), real(x.bytes())},
      [&](Backend& b) { b.rope(num(in), rows, heads, size, in.raw(), in.strides()[0], table.raw(), y.raw(), inverse); });
  return y;
}

class RopeNode final : public Node {
 public:
  Tensor table;
  DType dtype = DType::f32;
  std::string_view name() const override { return "rope"; }
  void release() override { table = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {turn(grads[0].detach().to(dtype), table, true)};
  }
};

}  // namespace

Tensor rope(const Tensor& x, const Tensor& table) {
  check_floating("rope", "input", x);
  check_device("rope", "table", table, x);
  if (table.dtype() != compute_dtype(x.dtype()))
    wrong("rope", "table's element type", std::string(name_of(compute_dtype(x.dtype()))), std::string(name_of(table.dtype())));
  if (table.rank() != 2 || table.size(1) < 2 || table.size(1) % 2 != 0)
    wrong("rope", "table's shape", "[T, D] with an even D", to_string(table.shape()));
  const std::int64_t size = table.size(1);
  const bool flat = x.rank() == 2 && x.size(1) % size == 0, by_head = x.rank() == 3 && x.size(2) == size;
  if ((!flat && !by_head) || x.size(0) != table.size(0))
    wrong("rope", "input's shape", "[" + std::to_string(table.size(0)) + ", heads, " + std::to_string(size) + "] (or its heads in one dimension)",
          to_string(x.shape()));
  const Tensor angles = table.detach().contiguous();
  Tensor y = turn(x, angles, false);
  if (any_requires_grad({&x})) {
    auto node = std::make_shared<RopeNode>();
    node->table = angles, node->dtype = x.dtype();
    record(node, {&x}, {&y});
  }
  return y;
}

Tensor rope_table(const Tensor& positions, std::int64_t head_size, double theta, DType dtype) {
  if (!positions.defined()) wrong("rope_table", "positions", "a tensor", "an undefined one");
  check_ids("rope_table", "positions", positions, DType::i32, positions);
  if (head_size < 2 || head_size % 2 != 0) wrong("rope_table", "head size", "an even number", std::to_string(head_size));
  if (!(theta > 0)) wrong("rope_table", "theta", "a positive number", std::to_string(theta));
  if (dtype != DType::f32 && dtype != DType::f64) wrong("rope_table", "element type", "f32 or f64", std::string(name_of(dtype)));
  const Tensor at = positions.detach().contiguous();
  Tensor table = Tensor::empty(Dims{at.numel(), head_size}, dtype, at.device());
  OpScope scope(at.device(), "rope_table", {real(table.numel()), real(at.bytes()), real(table.bytes())});
  if (scope.meta()) return table;
  at.device().backend().rope_table(num(table), at.numel(), head_size, theta, at.data<std::int32_t>(), table.raw());
  return table;
}

}  // namespace capstan::ops
