// attention: causal, ragged, grouped-query; and the same over paged keys and values.
#include "ops/num.h"

#include <capstan/autograd.h>
#include <capstan/ops.h>
#include <kernels/cpu/attention.h>

#include <cmath>

namespace capstan::ops {

namespace {

using kernels::cpu::AttentionArgs;

double scale_of(const AttentionShape& s) { return s.scale != 0 ? s.scale : 1.0 / std::sqrt(static_cast<double>(s.head_size)); }

/// Pairs (query, key) that causal attention looks at.
double pairs(const Space& space) {
  double n = 0;
  for (std::int64_t s = 0; s < space.sequences(); ++s) {
    const double len = space.host_starts[static_cast<std::size_t>(s) + 1] - space.host_starts[static_cast<std::size_t>(s)];
    n += len * (len + 1) / 2;
  }
  return n;
}

template <class F>
void by_type(DType dtype, F&& f) {
  if (dtype == DType::f64) f(static_cast<double*>(nullptr));
  else if (dtype == DType::f32) f(static_cast<float*>(nullptr));
  else if (dtype == DType::bf16) f(static_cast<bf16*>(nullptr));
  else fail(Fault::programming, "attention", "element type: expected f64, f32 or bf16, got " + std::string(name_of(dtype)));
}

struct Saved {
  Tensor q, k, v, out, lse;
  std::vector<std::int32_t> starts;
  AttentionShape shape;
  template <class T>
  AttentionArgs<T> args() const {
    AttentionArgs<T> a;
    a.q = q.data<T>(), a.k = k.data<T>(), a.v = v.data<T>(), a.out = out.data<T>();
    a.q_stride = q.strides()[0], a.k_stride = k.strides()[0], a.v_stride = v.strides()[0], a.out_stride = out.strides()[0];
    a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_size = shape.head_size, a.scale = scale_of(shape);
    a.starts = starts.data(), a.sequences = static_cast<std::int64_t>(starts.size()) - 1, a.rows = q.size(0);
    a.lse = lse.defined() ? lse.raw() : nullptr;
    return a;
  }
};

/// Rows past the last sequence belong to nobody: they are zero.
void clear_dead_rows(const Tensor& t, const std::vector<std::int32_t>& starts) {
  if (starts.back() < t.size(0)) t.narrow(0, starts.back(), t.size(0) - starts.back()).fill(0);
}

class AttentionNode final : public Node {
 public:
  Saved saved;
  double pair_count = 0;
  std::string_view name() const override { return "attention"; }
  void release() override { saved.q = saved.k = saved.v = saved.out = saved.lse = Tensor(); }
  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override {
    const Tensor dout = row_matrix(grads[0]);
    const AttentionShape& s = saved.shape;
    Device& device = dout.device();
    Tensor dq = Tensor::empty(saved.q.shape(), dout.dtype(), device);
    Tensor dk = Tensor::empty(saved.k.shape(), dout.dtype(), device), dv = Tensor::empty(saved.v.shape(), dout.dtype(), device);
    const double bytes = static_cast<double>(saved.q.bytes() + saved.k.bytes() * 2 + dout.bytes() * 2);
    // Four products of the model's; the scores that are rebuilt do not count.
  OpScope scope(device, "attention dx", {8 * pair_count * static_cast<double>(s.heads * s.head_size), bytes, bytes});
    if (!scope.meta())
      by_type(dout.dtype(), [&]<class T>(T*) {
        AttentionArgs<T> a = saved.args<T>();
        a.dout = dout.data<T>(), a.dout_stride = dout.strides()[0];
        a.dq = dq.data<T>(), a.dk = dk.data<T>(), a.dv = dv.data<T>();
        a.dq_stride = dq.strides()[0], a.dkv_stride = dk.strides()[0];
        kernels::cpu::attention_backward(device.cpu(), a);
        for (const Tensor* t : {&dq, &dk, &dv}) clear_dead_rows(*t, saved.starts);
      });
    return {dq, dk, dv};
  }
};

void check(const char* op, const Tensor& q, const AttentionShape& s) {
  if (s.heads < 1 || s.kv_heads < 1 || s.head_size < 1 || s.heads % s.kv_heads != 0)
    fail(Fault::programming, op, "heads: expected heads a multiple of kv_heads, got " + std::to_string(s.heads) + " and " + std::to_string(s.kv_heads));
  if (q.rank() != 2 || q.size(1) != s.heads * s.head_size)
    fail(Fault::programming, op, "q: expected [T, " + std::to_string(s.heads * s.head_size) + "], got " + to_string(q.shape()));
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Space& space, const AttentionShape& shape) {
  check("attention", q, shape);
  const Dims kv{q.size(0), shape.kv_heads * shape.head_size};
  if (!(k.shape() == kv) || !(v.shape() == kv) || k.dtype() != q.dtype() || v.dtype() != q.dtype())
    fail(Fault::programming, "attention", "k and v: expected " + to_string(kv) + " of q's element type, got " + to_string(k.shape()) + " and " + to_string(v.shape()));
  if (space.host_starts.empty() || space.used() > q.size(0))
    fail(Fault::programming, "attention", "the batch's sequences end at row " + std::to_string(space.used()) + ", q has " + std::to_string(q.size(0)));
  Saved saved{row_matrix(q), row_matrix(k), row_matrix(v), Tensor::empty(q.shape(), q.dtype(), q.device()), Tensor(), space.host_starts, shape};
  const bool grad = any_requires_grad({&q, &k, &v});
  if (grad) saved.lse = Tensor::empty(Dims{shape.heads, q.size(0)}, q.dtype() == DType::f64 ? DType::f64 : DType::f32, q.device());
  const double n = pairs(space);
  {
    OpScope scope(q.device(), "attention", {4 * n * static_cast<double>(shape.heads * shape.head_size),
                                            static_cast<double>(q.bytes() + 2 * k.bytes()), static_cast<double>(q.bytes())});
    if (!scope.meta())
      by_type(q.dtype(), [&]<class T>(T*) {
        kernels::cpu::attention_forward(q.device().cpu(), saved.args<T>());
        clear_dead_rows(saved.out, saved.starts);
      });
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
  if (past.page != kernels::cpu::attention_tile)
    fail(Fault::programming, "attention_paged", "page size: expected " + std::to_string(kernels::cpu::attention_tile) + " tokens, got " + std::to_string(past.page));
  if (q.requires_grad()) fail(Fault::programming, "attention_paged", "it has no gradient: run without a graph");
  const Tensor rows = row_matrix(q);
  Tensor out = Tensor::empty(q.shape(), q.dtype(), q.device());
  OpScope scope(q.device(), "attention_paged", {0, static_cast<double>(q.bytes()), static_cast<double>(q.bytes())});
  if (scope.meta()) return out;
  by_type(q.dtype(), [&]<class T>(T*) {
    kernels::cpu::PagedAttentionArgs<T> a;
    a.q = rows.data<T>(), a.out = out.data<T>(), a.q_stride = rows.strides()[0], a.out_stride = out.strides()[0];
    a.k_pages = past.k.data<T>(), a.v_pages = past.v.data<T>();
    a.blocks = past.blocks.data<std::int32_t>(), a.lengths = past.lengths.data<std::int32_t>(), a.starts = space.host_starts.data();
    a.blocks_stride = past.blocks.strides()[0], a.sequences = space.sequences();
    a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_size = shape.head_size, a.scale = scale_of(shape);
    kernels::cpu::attention_paged(q.device().cpu(), a);
    clear_dead_rows(out, space.host_starts);
  });
  return out;
}

}  // namespace capstan::ops
