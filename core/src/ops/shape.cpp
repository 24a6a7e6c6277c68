// reshape, transpose, slice, concat, cast: views where the layout allows.
#include "ops/common.h"

#include <capstan/ops.h>

namespace capstan::ops {

namespace {

// A saved shape and two numbers; `undo` maps the gradient back.
template <class Undo>
class ViewNode final : public Node {
 public:
  ViewNode(const char* name, Undo undo) : name_(name), undo_(std::move(undo)) {}
  std::string_view name() const override { return name_; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    if (!wants(0, part)) return {Tensor()};
    return {undo_(grads[0].detach())};
  }

 private:
  const char* name_;
  Undo undo_;
};

template <class Undo>
Tensor recorded(const char* name, const Tensor& a, Tensor out, Undo undo) {
  if (any_requires_grad({&a})) record(std::make_shared<ViewNode<Undo>>(name, std::move(undo)), {&a}, {&out});
  return out;
}

// A copy is work; a view is not.
Tensor compact(const char* name, const Tensor& a) {
  if (a.is_contiguous()) return a.detach();
  OpScope scope(a.device(), name, {0, real(a.bytes()), real(a.bytes())});
  return a.detach().contiguous();
}

void check_defined(const char* op, const Tensor& a) {
  if (!a.defined()) wrong(op, "input", "a tensor", "an undefined one");
}

class ConcatNode final : public Node {
 public:
  ConcatNode(int dim, std::vector<std::int64_t> lengths) : dim_(dim), lengths_(std::move(lengths)) {}
  std::string_view name() const override { return "concat"; }
  void release() override {}
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(lengths_.size());
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < lengths_.size(); begin += lengths_[i++])
      if (wants(static_cast<int>(i), part)) result[i] = grads[0].narrow(dim_, begin, lengths_[i]);
    return result;
  }

 private:
  int dim_;
  std::vector<std::int64_t> lengths_;
};

}  // namespace

Tensor reshape(const Tensor& a, const Dims& shape) {
  check_defined("reshape", a);
  Dims full = shape;
  std::int64_t known = 1;
  int open = -1;
  for (int i = 0; i < full.size(); ++i) {
    if (full[i] == -1 && open < 0) open = i;
    else known *= full[i];
  }
  if (open >= 0) full[open] = known == 0 ? 0 : a.numel() / known;
  if (full.product() != a.numel())
    wrong("reshape", "shape", "one of " + std::to_string(a.numel()) + " elements, as " + to_string(a.shape()), to_string(shape));
  return recorded("reshape", a, compact("reshape", a).view(full),
                  [before = a.shape()](const Tensor& g) { return compact("reshape dx", g).view(before); });
}

Tensor transpose(const Tensor& a, int d0, int d1) {
  check_defined("transpose", a);
  const int x = dimension("transpose", a, d0), y = dimension("transpose", a, d1);
  return recorded("transpose", a, a.transposed(x, y), [x, y](const Tensor& g) { return g.transposed(x, y); });
}

Tensor slice(const Tensor& a, int dim, std::int64_t begin, std::int64_t length) {
  check_defined("slice", a);
  const int d = dimension("slice", a, dim);
  if (begin < 0 || length < 0 || begin + length > a.shape()[d])
    wrong("slice", "range of dimension " + std::to_string(d), "one inside [0, " + std::to_string(a.shape()[d]) + ")",
          "[" + std::to_string(begin) + ", " + std::to_string(begin + length) + ")");
  return recorded("slice", a, a.narrow(d, begin, length), [before = a.shape(), d, begin, length](const Tensor& g) {
    Tensor dx = Tensor::empty(before, g.dtype(), g.device());
    OpScope scope(g.device(), "slice dx", {0, real(g.bytes()), real(dx.bytes())});
    const std::int64_t end = begin + length;
    dx.narrow(d, 0, begin).fill(0);
    dx.narrow(d, begin, length).copy_from(g);
    dx.narrow(d, end, before[d] - end).fill(0);
    return dx;
  });
}

Tensor concat(std::span<const Tensor> parts, int dim) {
  if (parts.empty()) wrong("concat", "parts", "at least one", "none");
  check_defined("concat", parts[0]);
  const int d = dimension("concat", parts[0], dim);
  Dims shape = parts[0].shape();
  shape[d] = 0;
  std::vector<std::int64_t> lengths;
  bool graph = false;
  for (const Tensor& part : parts) {
    check_device("concat", "part", part, parts[0]);
    if (part.dtype() != parts[0].dtype())
      wrong("concat", "element type", std::string(name_of(parts[0].dtype())) + " (use cast)", std::string(name_of(part.dtype())));
    Dims expected = parts[0].shape();
    if (part.rank() == expected.size()) expected[d] = part.shape()[d];
    check_shape("concat", "part", part, expected);
    lengths.push_back(part.shape()[d]);
    shape[d] += lengths.back();
    graph |= part.requires_grad();
  }
  Tensor out = Tensor::empty(shape, parts[0].dtype(), parts[0].device());
  {
    OpScope scope(out.device(), "concat", {0, real(out.bytes()), real(out.bytes())});
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < parts.size(); begin += lengths[i++]) out.narrow(d, begin, lengths[i]).copy_from(parts[i]);
  }
  if (graph) record(std::make_shared<ConcatNode>(d, lengths), parts, std::span<Tensor>(&out, 1));
  return out;
}

Tensor cast(const Tensor& a, DType dtype) {
  check_defined("cast", a);
  if (dtype == a.dtype()) return a;
  if (a.requires_grad() && !is_floating(dtype))
    wrong("cast", "element type of a tensor with a gradient", "a floating one", std::string(name_of(dtype)));
  Tensor out;
  {
    OpScope scope(a.device(), "cast", {real(a.numel()), real(a.bytes()), real(a.numel() * size_of(dtype))});
    out = a.detach().to(dtype);
  }
  return recorded("cast", a, out, [before = a.dtype()](const Tensor& g) {
    OpScope scope(g.device(), "cast dx", {real(g.numel()), real(g.bytes()), real(g.numel() * size_of(before))});
    return g.to(before);
  });
}

}  // namespace capstan::ops
