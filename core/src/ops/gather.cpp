// gather and embedding: rows by id. Their gradient adds rows in the order of the ids, without atomics.
#include "ops/gather.h"

#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

class GatherNode final : public Node {
 public:
  GatherNode(const char* name, const Tensor& table, Tensor ids)
      : name_(name), ids_(std::move(ids)), shape_(table.shape()), dtype_(table.dtype()) {}
  std::string_view name() const override { return name_; }
  void release() override { ids_ = Tensor(); }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    const Tensor g = incoming(grads[0], dtype_);
    Leaf* to = leaf(0);
    if (to == nullptr || !to->parameter()) {
      Tensor dx = Tensor::empty(shape_, dtype_, g.device());
      scatter(g, dx, true);
      return {dx};
    }
    bool overwrite = true;
    // Only shape, element type and device of `like` count: the table itself may be elsewhere by now.
    const Tensor like = Tensor::wrap(nullptr, shape_, dtype_, g.device(), nullptr);
    const Tensor sum = to->accumulate_into(like, overwrite);
    scatter(g, sum, overwrite);
    to->done();
    return {Tensor()};
  }

 private:
  void scatter(const Tensor& g, const Tensor& table, bool overwrite) const {
    const std::int64_t n = shape_[0], m = ids_.numel();
    const std::int64_t cols = n == 0 ? 0 : shape_.product() / n;
    const double touched = overwrite ? real(table.bytes()) : real(m * cols * size_of(table.dtype()));
    OpScope scope(g.device(), name_, {real(g.numel()), real(g.bytes()) + (overwrite ? 0 : touched), touched});
    if (scope.meta()) return;
    g.device().backend().scatter_add_rows(num(g), m, cols, ids_.data<std::int32_t>(), g.raw(), n, num(table), table.raw(), overwrite);
  }

  const char* name_;
  Tensor ids_;
  Dims shape_;
  DType dtype_;
};

void check_operands(const char* op, const Tensor& a, const Tensor& ids) {
  check_floating(op, "table", a);
  if (a.rank() == 0) wrong(op, "table's shape", "at least one dimension", to_string(a.shape()));
  check_ids(op, "ids", ids, DType::i32, a);
}

Tensor gather_named(const char* op, const Tensor& a, const Tensor& ids) {
  check_operands(op, a, ids);
  check_rows(op, ids, a.size(0));
  return gather_checked(op, a, ids);
}

}  // namespace

Tensor gather_checked(const char* op, const Tensor& a, const Tensor& ids) {
  check_operands(op, a, ids);
  const std::int64_t n = a.size(0), m = ids.numel();
  Dims shape = a.shape();
  shape[0] = m;
  const Tensor table = a.detach().contiguous(), index = ids.detach().contiguous();
  Tensor out = Tensor::empty(shape, a.dtype(), a.device());
  {
    OpScope scope(a.device(), op, {0, real(out.bytes() + ids.bytes()), real(out.bytes())});
    if (!scope.meta() && m > 0) a.device().backend().gather_rows(m, out.bytes() / m, table.raw(), n, index.data<std::int32_t>(), out.raw());
  }
  if (any_requires_grad({&a})) record(std::make_shared<GatherNode>(op, a, index), {&a}, {&out});
  return out;
}

void check_rows(const char* op, const Tensor& ids, std::int64_t rows) {
  if (ids.is_meta()) return;
  const Tensor index = ids.detach().contiguous();
  const std::int64_t bad = ids.device().backend().first_outside(op, index.numel(), index.data<std::int32_t>(), 0, rows);
  if (bad >= 0)
    wrong(op, "ids[" + std::to_string(bad) + "]", "a row of [0, " + std::to_string(rows) + ")", std::to_string(static_cast<std::int64_t>(index.narrow(0, bad, 1).item())));
}

Tensor gather(const Tensor& a, const Tensor& ids) { return gather_named("gather", a, ids); }

Tensor embedding(const Tensor& table, const Tensor& ids) {
  if (table.defined() && table.rank() != 2) wrong("embedding", "table's shape", "[V, C]", to_string(table.shape()));
  return gather_named("embedding", table, ids);
}

}  // namespace capstan::ops
