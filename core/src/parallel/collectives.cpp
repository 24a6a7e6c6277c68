// Collectives as differentiable ops, each with its transpose.
#include "parallel/collectives.h"

#include "mesh/mesh.h"
#include "ops/common.h"

#include <capstan/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace capstan::parallel {

namespace {

using ops::real;
using ops::wrong;

Communicator* ranks_along(const ForwardContext& context, std::string_view axis) {
  return context.mesh == nullptr || context.mesh->size(axis) == 1 ? nullptr : &context.mesh->comm(axis);
}

/// x with dimension 0 times `factor` over `divisor`.
Dims rows_times(const Dims& shape, std::int64_t factor, std::int64_t divisor) {
  Dims result = shape;
  result[0] = shape[0] * factor / divisor;
  return result;
}

Tensor gather(const char* name, const Tensor& x, Communicator& comm) {
  const Tensor in = x.detach().contiguous();
  Tensor out = Tensor::empty(rows_times(in.shape(), comm.size(), 1), in.dtype(), in.device());
  OpScope scope(in.device(), name, {0, real(in.bytes()), real(out.bytes()), real(out.bytes() - in.bytes())});
  if (!scope.meta()) comm.all_gather(in.raw(), out.raw(), in.numel(), in.dtype()).wait();
  return out;
}

Tensor reduce_scatter(const char* name, const Tensor& x, Communicator& comm) {
  const Tensor in = x.detach().contiguous();
  Tensor out = Tensor::empty(rows_times(in.shape(), 1, comm.size()), in.dtype(), in.device());
  OpScope scope(in.device(), name, {real(in.numel()), real(in.bytes()), real(out.bytes()), real(in.bytes() - out.bytes())});
  if (!scope.meta()) comm.reduce_scatter(in.raw(), out.raw(), out.numel(), in.dtype()).wait();
  return out;
}

/// A linear map and its transpose.
template <class Transpose>
class TransposedNode final : public Node {
 public:
  TransposedNode(const char* name, DType dtype, Transpose transpose)
      : name_(name), dtype_(dtype), transpose_(std::move(transpose)) {}
  std::string_view name() const override { return name_; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {transpose_(ops::incoming(grads[0], dtype_))};
  }

 private:
  const char* name_;
  DType dtype_;
  Transpose transpose_;
};

template <class Transpose>
Tensor recorded(const char* name, const Tensor& x, Tensor out, Transpose transpose) {
  if (any_requires_grad({&x}))
    record(std::make_shared<TransposedNode<Transpose>>(name, x.dtype(), std::move(transpose)), {&x}, {&out});
  return out;
}

void check_rows(const char* op, const Tensor& x) {
  ops::check_floating(op, "input", x);
  if (x.rank() == 0) wrong(op, "input's shape", "[rows, ...]", to_string(x.shape()));
}

/// Blocks of equal width [ranks, n, most]: the collectives of equal counts are the fast ones.
std::int64_t widest(std::span<const std::int64_t> widths) { return *std::max_element(widths.begin(), widths.end()); }

}  // namespace

Communicator* tensor_ranks(const ForwardContext& context) { return ranks_along(context, "tensor"); }
Communicator* context_ranks(const ForwardContext& context) { return ranks_along(context, "context"); }

Tensor gather_rows(const Tensor& x, Communicator& comm) {
  check_rows("gather_rows", x);
  return recorded("gather_rows", x, gather("gather_rows", x, comm),
                  [&comm](const Tensor& g) { return reduce_scatter("gather_rows dx", g, comm); });
}

Tensor reduce_scatter_rows(const Tensor& x, Communicator& comm) {
  check_rows("reduce_scatter_rows", x);
  if (x.size(0) % comm.size() != 0)
    wrong("reduce_scatter_rows", "rows", "a multiple of the " + std::to_string(comm.size()) + " ranks",
          std::to_string(x.size(0)));
  return recorded("reduce_scatter_rows", x, reduce_scatter("reduce_scatter_rows", x, comm),
                  [&comm](const Tensor& g) { return gather("reduce_scatter_rows dx", g, comm); });
}

Tensor gather_columns(const Tensor& x, std::span<const std::int64_t> widths, Communicator& comm) {
  constexpr const char* op = "gather_columns";
  check_rows(op, x);
  if (static_cast<int>(widths.size()) != comm.size())
    wrong(op, "widths", "one for each of " + std::to_string(comm.size()) + " ranks", std::to_string(widths.size()));
  const auto rank = static_cast<std::size_t>(comm.rank());
  if (x.rank() != 2 || x.size(1) != widths[rank])
    wrong(op, "input's shape", "[n, " + std::to_string(widths[rank]) + "]", to_string(x.shape()));
  const std::int64_t n = x.size(0), most = widest(widths),
                     total = std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
  Tensor mine = Tensor::empty(Dims{n, most}, x.dtype(), x.device());
  mine.narrow(1, 0, x.size(1)).copy_from(x.detach());
  mine.narrow(1, x.size(1), most - x.size(1)).fill(0);
  const Tensor blocks = gather(op, mine, comm);
  Tensor out = Tensor::empty(Dims{n, total}, x.dtype(), x.device());
  std::int64_t at = 0;
  for (std::size_t r = 0; r < widths.size(); at += widths[r++])
    out.narrow(1, at, widths[r]).copy_from(blocks.narrow(0, static_cast<std::int64_t>(r) * n, n).narrow(1, 0, widths[r]));
  return recorded(
      op, x, out, [&comm, w = std::vector<std::int64_t>(widths.begin(), widths.end()), n, most, rank](const Tensor& g) {
        const Tensor parts = Tensor::empty(Dims{static_cast<std::int64_t>(w.size()) * n, most}, g.dtype(), g.device());
        std::int64_t from = 0;
        for (std::size_t r = 0; r < w.size(); from += w[r++]) {
          const Tensor block = parts.narrow(0, static_cast<std::int64_t>(r) * n, n);
          block.narrow(1, 0, w[r]).copy_from(g.narrow(1, from, w[r]));
          block.narrow(1, w[r], most - w[r]).fill(0);
        }
        return reduce_scatter("gather_columns dx", parts, comm).narrow(1, 0, w[rank]).contiguous();
      });
}

}  // namespace capstan::parallel
