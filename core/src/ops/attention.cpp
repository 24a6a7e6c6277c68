// attention: causal, ragged, grouped-query; and the same over paged keys and values.
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/backend.h>

#include <algorithm>
#include <cmath>

namespace capstan::ops {

namespace {

constexpr std::int64_t page_tokens = 64;  // of a paged past: the tile that sums over keys run in

double scale_of(const AttentionShape& s) { return s.scale != 0 ? s.scale : 1.0 / std::sqrt(static_cast<double>(s.head_size)); }

/// Pairs (query, key) that causal attention over `window` keys looks at.
double pairs(const Space& space, std::int64_t window) {
  double n = 0;
  for (std::int64_t s = 0; s < space.sequences(); ++s) {
    const double len = space.host_starts[static_cast<std::size_t>(s) + 1] - space.host_starts[static_cast<std::size_t>(s)];
    const double most = window > 0 ? std::min(len, static_cast<double>(window)) : len;
    n += most * (most + 1) / 2 + (len - most) * most;
  }
  return n;
}

struct Saved {
  Tensor q, k, v, out, lse, starts;
  std::vector<std::int32_t> host_starts;
  std::int64_t longest = 0;
  bool recorded = false;
  AttentionShape shape;
  kernels::Attention args() const {
    kernels::Attention a;
    a.num = num_of(q.dtype(), "attention");
    a.q = q.raw(), a.k = k.raw(), a.v = v.raw(), a.out = out.raw();
    a.q_stride = q.strides()[0], a.k_stride = k.strides()[0], a.v_stride = v.strides()[0], a.out_stride = out.strides()[0];
    a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_size = shape.head_size, a.window = shape.window, a.scale = scale_of(shape);
    a.host_starts = recorded ? nullptr : host_starts.data(), a.starts = starts.data<std::int32_t>();
    a.sequences = static_cast<std::int64_t>(host_starts.size()) - 1, a.rows = q.size(0), a.longest = longest;
    a.lse = lse.defined() ? lse.raw() : nullptr;
    return a;
  }
};

/// The sequences' starts where the kernels read them.
Tensor device_starts(const Space& space, Device& device) {
  if (device.kind() == DeviceKind::meta) return Tensor();
  if (space.starts.defined() && &space.starts.device() == &device) return space.starts.detach().contiguous();
  return Tensor::of<std::int32_t>(space.host_starts, Dims{static_cast<std::int64_t>(space.host_starts.size())}, device);
}

/// The most tokens that a sequence has, or may have in a batch of these capacities.
std::int64_t longest_of(const Space& space) {
  std::int64_t n = space.longest;
  for (std::size_t s = 1; s < space.host_starts.size(); ++s) n = std::max<std::int64_t>(n, space.host_starts[s] - space.host_starts[s - 1]);
  return n;
}

class AttentionNode final : public Node {
 public:
  Saved saved;
  double pair_count = 0;
  std::string_view name() const override { return "attention"; }
  void release() override { saved.q = saved.k = saved.v = saved.out = saved.lse = saved.starts = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override {
    const Tensor dout = row_matrix(grads[0]);
    const AttentionShape& s = saved.shape;
    Device& device = dout.device();
    Tensor dq, dk, dv;
    const std::int64_t wide = s.heads * s.head_size, narrow = s.kv_heads * s.head_size;
    if (saved.q.storage() == saved.k.storage() && saved.k.storage() == saved.v.storage() && saved.q.strides()[0] == wide + 2 * narrow) {
      // Slices of one projection: so are their gradients, and split's backward has nothing to copy.
      const Tensor whole = Tensor::empty(Dims{saved.q.size(0), wide + 2 * narrow}, dout.dtype(), device);
      dq = whole.narrow(1, 0, wide), dk = whole.narrow(1, wide, narrow), dv = whole.narrow(1, wide + narrow, narrow);
    } else {
      dq = Tensor::empty(saved.q.shape(), dout.dtype(), device);
      dk = Tensor::empty(saved.k.shape(), dout.dtype(), device), dv = Tensor::empty(saved.v.shape(), dout.dtype(), device);
    }
    const double bytes = static_cast<double>(saved.q.bytes() + saved.k.bytes() * 2 + dout.bytes() * 2);
    // Four products of the model's; the scores that are rebuilt do not count.
    OpScope scope(device, "attention dx", {8 * pair_count * static_cast<double>(s.heads * s.head_size), bytes, bytes});
    if (!scope.meta()) {
      kernels::Attention a = saved.args();
      a.dout = dout.raw(), a.dout_stride = dout.strides()[0];
      a.dq = dq.raw(), a.dk = dk.raw(), a.dv = dv.raw();
      a.dq_stride = dq.strides()[0], a.dkv_stride = dk.strides()[0];
      device.backend().attention_backward(a);
    }
    return {dq, dk, dv};
  }
};

void check(const char* op, const Tensor& q, const AttentionShape& s) {
  if (s.heads < 1 || s.kv_heads < 1 || s.head_size < 1 || s.heads % s.kv_heads != 0)
    fail(Fault::programming, op, "heads: expected heads a multiple of kv_heads, got " + std::to_string(s.heads) + " and " + std::to_string(s.kv_heads));
  if (s.window < 0) fail(Fault::programming, op, "window: expected a number of keys, or 0 for all, got " + std::to_string(s.window));
  if (q.rank() != 2 || q.size(1) != s.heads * s.head_size)
    fail(Fault::programming, op, "q: expected [T, " + std::to_string(s.heads * s.head_size) + "], got " + to_string(q.shape()));
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Space& space, const AttentionShape& shape) {
  check("attention", q, shape);
  const Dims kv{q.size(0), shape.kv_heads * shape.head_size};
  if (!(k.shape() == kv) || !(v.shape() == kv) || k.dtype() != q.dtype() || v.dtype() != q.dtype())
    fail(Fault::programming, "attention", "k and v: expected " + to_string(kv) + " of q's element type, got " + to_string(k.shape()) + " and " + to_string(v.shape()));
  if (space.cut != nullptr)
    fail(Fault::programming, "attention", "the batch has parts of sequences that context ranks share: use nn::attention, which gathers their keys");
  if (space.host_starts.empty() || space.used() > q.size(0))
    fail(Fault::programming, "attention", "the batch's sequences end at row " + std::to_string(space.used()) + ", q has " + std::to_string(q.size(0)));
  Saved saved{row_matrix(q), row_matrix(k), row_matrix(v), Tensor::empty(q.shape(), q.dtype(), q.device()), Tensor(), device_starts(space, q.device()),
              space.host_starts, longest_of(space), space.recorded, shape};
  const bool grad = any_requires_grad({&q, &k, &v});
  if (grad) saved.lse = Tensor::empty(Dims{shape.heads, q.size(0)}, q.dtype() == DType::f64 ? DType::f64 : DType::f32, q.device());
  const double n = pairs(space, shape.window);
  {
    OpScope scope(q.device(), "attention", {4 * n * static_cast<double>(shape.heads * shape.head_size),
                                            static_cast<double>(q.bytes() + 2 * k.bytes()), static_cast<double>(q.bytes())});
    if (!scope.meta()) q.device().backend().attention(saved.args());
  }
  Tensor out = saved.out;
  if (grad) {
    auto node = std::make_shared<AttentionNode>();
    node->saved = std::move(saved), node->pair_count = n;
    record(node, {&q, &k, &v}, {&out});
  }
  return out;
}

Tensor attention_paged(const Tensor& q, const PagedKV& past, const Space& space, const AttentionShape& shape) {
  check("attention_paged", q, shape);
  if (past.page != page_tokens)
    fail(Fault::programming, "attention_paged", "page size: expected " + std::to_string(page_tokens) + " tokens, got " + std::to_string(past.page));
  if (q.requires_grad()) fail(Fault::programming, "attention_paged", "it has no gradient: run without a graph");
  const Tensor rows = row_matrix(q);
  Tensor out = Tensor::empty(q.shape(), q.dtype(), q.device());
  OpScope scope(q.device(), "attention_paged", {0, static_cast<double>(q.bytes()), static_cast<double>(q.bytes())});
  if (scope.meta()) return out;
  kernels::PagedAttention a;
  a.num = num_of(q.dtype(), "attention_paged");
  a.q = rows.raw(), a.out = out.raw(), a.q_stride = rows.strides()[0], a.out_stride = out.strides()[0], a.page = past.page;
  a.k_pages = past.k.raw(), a.v_pages = past.v.raw();
  a.blocks = past.blocks.data<std::int32_t>(), a.lengths = past.lengths.data<std::int32_t>();
  const Tensor starts = device_starts(space, q.device());
  a.host_starts = space.recorded ? nullptr : space.host_starts.data(), a.starts = starts.data<std::int32_t>();
  a.blocks_stride = past.blocks.strides()[0], a.sequences = space.sequences(), a.rows = q.size(0);
  a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_size = shape.head_size, a.window = shape.window, a.scale = scale_of(shape);
  q.device().backend().attention_paged(a);
  return out;
}

}  // namespace capstan::ops
