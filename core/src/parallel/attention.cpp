// Attention over sequences that context ranks share: every rank gathers the keys and values of all and attends with its own
// rows (the all-gather form of context parallelism). A row's arithmetic is that of one rank, tile by tile.
#include "parallel/attention.h"

#include "ops/common.h"
#include "parallel/context_cut.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

namespace capstan::parallel {

namespace {

using ops::real;
using Chunk = ContextCut::Chunk;

/// Between [ranks * capacity, width] as the collectives lay it and the sequences' order: copies `f(gathered row, whole row,
/// count)`.
template <class F>
void for_chunks(const ContextCut& cut, F&& f) {
  for (const Chunk& c : cut.chunks) f(c.rank * cut.capacity + c.local, c.whole, c.length);
}

double bytes_sent(const Tensor& gathered, const Communicator& comm) {
  return real(gathered.bytes()) * (comm.size() - 1) / comm.size();
}

/// k and v of this rank's rows side by side -> those of all sequences, in their order.
Tensor gather_sequences(const Tensor& k, const Tensor& v, const ContextCut& cut, Communicator& comm) {
  const std::int64_t width = k.size(1), used = cut.starts.back();
  Device& device = k.device();
  const Tensor mine = Tensor::empty(Dims{cut.capacity, 2 * width}, k.dtype(), device);
  mine.narrow(1, 0, width).copy_from(k.detach());
  mine.narrow(1, width, width).copy_from(v.detach());
  const Tensor gathered = Tensor::empty(Dims{comm.size() * cut.capacity, 2 * width}, k.dtype(), device);
  Tensor whole = Tensor::empty(Dims{used, 2 * width}, k.dtype(), device);
  OpScope scope(device, "gather_sequences",
                {0, real(3 * gathered.bytes()), real(2 * gathered.bytes()), bytes_sent(gathered, comm)});
  if (scope.meta()) return whole;
  comm.all_gather(mine.raw(), gathered.raw(), mine.numel(), k.dtype()).wait();
  for_chunks(cut, [&](std::int64_t from, std::int64_t to, std::int64_t n) {
    whole.narrow(0, to, n).copy_from(gathered.narrow(0, from, n));
  });
  return whole;
}

/// The transpose: gradients of all sequences' rows by this rank's queries -> the sum for this rank's rows, [capacity,
/// width].
Tensor scatter_sequences(const Tensor& whole, const ContextCut& cut, Communicator& comm) {
  Device& device = whole.device();
  const std::int64_t width = whole.size(1);
  const Tensor laid = Tensor::empty(Dims{comm.size() * cut.capacity, width}, whole.dtype(), device);
  Tensor mine = Tensor::empty(Dims{cut.capacity, width}, whole.dtype(), device);
  OpScope scope(device, "gather_sequences dx",
                {real(laid.numel()), real(2 * laid.bytes()), real(2 * laid.bytes()), bytes_sent(laid, comm)});
  if (scope.meta()) return mine;
  laid.fill(0);  // rows of the dead sequence
  for_chunks(cut, [&](std::int64_t to, std::int64_t from, std::int64_t n) {
    laid.narrow(0, to, n).copy_from(whole.narrow(0, from, n));
  });
  comm.reduce_scatter(laid.raw(), mine.raw(), mine.numel(), whole.dtype()).wait();
  return mine;
}

/// This rank's runs of rows, each the last ones of a stretch of keys.
struct Runs {
  std::vector<std::int32_t> starts{0}, key_begins, key_counts;
  std::int64_t longest = 0;
  double pairs = 0;  ///< (query, key) that they look at

  Runs(const ContextCut& cut, std::int64_t window) {
    key_begins.reserve(1),
        key_counts.reserve(1);  // of no sequence at all: still a pointer, which says that keys lie elsewhere
    for (const Chunk& c : cut.chunks) {
      if (c.rank != cut.rank) continue;
      const std::int32_t begin = cut.starts[static_cast<std::size_t>(c.sequence)], count = c.offset + c.length;
      if (!key_begins.empty() && key_begins.back() == begin &&
          key_counts.back() == c.offset) {  // it goes on where the last one ended
        starts.back() += c.length, key_counts.back() = count;
      } else {
        starts.push_back(starts.back() + c.length), key_begins.push_back(begin), key_counts.push_back(count);
      }
      longest = std::max<std::int64_t>(longest, starts.back() - starts[starts.size() - 2]);
      // Rows that see all keys up to their own, then those that see a window of them.
      const std::int64_t growing = window > 0 ? std::clamp<std::int64_t>(window - c.offset, 0, c.length) : c.length;
      pairs += real(growing) * c.offset + real(growing) * real(growing + 1) / 2 + real(c.length - growing) * real(window);
    }
  }
};

class ContextAttentionNode final : public Node {
 public:
  Tensor q, out, lse, starts;
  Tensor k, v;  // of this rank's rows
  std::shared_ptr<const ContextCut> cut;
  std::shared_ptr<const Runs> runs;
  ops::AttentionShape shape;
  Communicator* comm = nullptr;
  std::string_view name() const override { return "attention"; }
  void release() override { q = out = lse = starts = k = v = Tensor(); }

  kernels::Attention args(const Tensor& whole) const {
    const std::int64_t width = shape.kv_heads * shape.head_size;
    kernels::Attention a;
    a.num = ops::num(q);
    a.q = q.raw(), a.k = whole.raw(), a.v = whole.narrow(1, width, width).raw(), a.out = out.raw();
    a.q_stride = q.strides()[0], a.k_stride = a.v_stride = 2 * width, a.out_stride = out.strides()[0];
    a.heads = shape.heads, a.kv_heads = shape.kv_heads, a.head_size = shape.head_size, a.window = shape.window;
    a.scale = shape.scale != 0 ? shape.scale : 1 / std::sqrt(real(shape.head_size));
    a.host_starts = runs->starts.data(), a.starts = starts.data<std::int32_t>();
    a.host_key_begins = runs->key_begins.data(), a.host_key_counts = runs->key_counts.data();
    a.sequences = static_cast<std::int64_t>(runs->key_begins.size()), a.rows = q.size(0), a.longest = runs->longest;
    a.lse = lse.defined() ? lse.raw() : nullptr;
    return a;
  }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part) override {
    const Tensor dout = ops::row_matrix(grads[0]);
    Device& device = dout.device();
    const std::int64_t width = shape.kv_heads * shape.head_size;
    const Tensor whole =
        gather_sequences(k, v, *cut, *comm);  // not kept since the forward: that would be C times the memory
    const Tensor dq = Tensor::empty(q.shape(), dout.dtype(), device);
    const Tensor d_whole = Tensor::empty(whole.shape(), dout.dtype(), device);
    {
      const double bytes = real(2 * q.bytes() + 2 * dout.bytes() + whole.bytes() + d_whole.bytes());
      OpScope scope(device, "attention dx", {8 * runs->pairs * real(shape.heads * shape.head_size), bytes, bytes});
      d_whole.fill(0);  // nobody here sees the sequences' last keys
      if (!scope.meta()) {
        kernels::Attention a = args(whole);
        a.dout = dout.raw(), a.dout_stride = dout.strides()[0];
        a.dq = dq.raw(), a.dk = d_whole.raw(), a.dv = d_whole.narrow(1, width, width).raw();
        a.dq_stride = dq.strides()[0], a.dkv_stride = 2 * width;
        device.backend().attention_backward(a);
      }
    }
    const Tensor d_mine = scatter_sequences(d_whole, *cut, *comm);
    return {dq, d_mine.narrow(1, 0, width), d_mine.narrow(1, width, width)};
  }
};

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Space& space, const ops::AttentionShape& shape,
                 Communicator& comm) {
  constexpr const char* op = "attention";
  const ContextCut& cut = *space.cut;
  ops::check_floating(op, "q", q);
  ops::check_like(op, "k", k, q);
  ops::check_like(op, "v", v, q);
  if (shape.heads < 1 || shape.kv_heads < 1 || shape.heads % shape.kv_heads != 0)
    ops::wrong(op, "heads", "a multiple of the key/value heads",
               std::to_string(shape.heads) + " and " + std::to_string(shape.kv_heads));
  if (shape.window < 0) ops::wrong(op, "window", "a number of keys, or 0 for all", std::to_string(shape.window));
  ops::check_shape(op, "q", q, Dims{cut.capacity, shape.heads * shape.head_size});
  ops::check_shape(op, "k", k, Dims{cut.capacity, shape.kv_heads * shape.head_size});
  ops::check_shape(op, "v", v, k.shape());
  Device& device = q.device();
  auto node = std::make_shared<ContextAttentionNode>();
  node->q = ops::row_matrix(q), node->k = k.detach(), node->v = v.detach();
  node->out = Tensor::empty(q.shape(), q.dtype(), device);
  node->cut = space.cut, node->runs = std::make_shared<const Runs>(cut, shape.window), node->shape = shape, node->comm = &comm;
  const bool grad = any_requires_grad({&q, &k, &v});
  if (grad) node->lse = Tensor::empty(Dims{shape.heads, q.size(0)}, ops::compute_dtype(q.dtype()), device);
  node->starts =
      Tensor::of<std::int32_t>(node->runs->starts, Dims{static_cast<std::int64_t>(node->runs->starts.size())}, device);
  const Tensor whole = gather_sequences(k, v, cut, comm);
  {
    OpScope scope(
        device, op,
        {4 * node->runs->pairs * real(shape.heads * shape.head_size), real(q.bytes() + whole.bytes()), real(q.bytes())});
    if (!scope.meta()) device.backend().attention(node->args(whole));
  }
  Tensor out = node->out;
  if (grad) record(node, {&q, &k, &v}, {&out});
  return out;
}

}  // namespace capstan::parallel
