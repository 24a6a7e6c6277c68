// Attention as cuDNN graphs. Forward: scores, masks, softmax written out, values; backward: scores again from the saved
// log-sum-exp, then the five products. The engines recognize this form and run it as one fused kernel.
#if defined(CAPSTAN_CUDNN)
#include <kernels/cuda/cudnn_attention.h>
#include <kernels/cuda/cudnn_graph.h>

#include <algorithm>
#include <limits>
#include <map>
#include <vector>

namespace capstan::kernels::cuda {

namespace {

using Tensor = CudnnGraph::Tensor;
using Four = CudnnGraph::Four;

/// Ids of what a run passes in; 0: not part of the graph.
struct Ids {
  std::int64_t q = 0, k = 0, v = 0, out = 0, stats = 0, scale = 0, low = 0, one = 0, window = 0;
  std::int64_t offsets[6] = {}, lengths = 0;  // of q, k, v, out (and dout), stats, dq (and its sums)
  std::int64_t dkv_offsets = 0, dout = 0, dq = 0, dk = 0, dv = 0, sums = 0, dq_sums = 0, dk_heads = 0, dv_heads = 0;
};

/// The tensors that both graphs share.
struct Parts {
  Tensor lengths, offsets[6], dkv_offsets, q, k, v, out, stats, scale, low, window;
};

/// Whether sequences may end ahead of the graph's length.
bool masks_ends(const CudnnShape& s) { return s.ragged || s.padded; }

Parts inputs(CudnnGraph& g, const CudnnShape& s, Ids& ids) {
  Parts p;
  const std::int64_t b = s.batch, n = s.length, d = s.head_size;
  const Tensor* ragged[6] = {};
  if (s.ragged) {
    for (int i = 0; i < 6; ++i) {
      if (i == 5 && !s.backward) continue;
      p.offsets[i] = g.memory({b + 1, 1, 1, 1}, {1, 1, 1, 1}, CUDNN_DATA_INT32);
      ids.offsets[i] = p.offsets[i].id, ragged[i] = &p.offsets[i];
    }
  }
  if (masks_ends(s)) {
    p.lengths = g.memory({b, 1, 1, 1}, {1, 1, 1, 1}, CUDNN_DATA_INT32);
    ids.lengths = p.lengths.id;
  }
  p.q = g.memory({b, s.heads, n, d}, {n * s.q_stride, d, s.q_stride, 1}, CUDNN_DATA_BFLOAT16, ragged[0]);
  p.k = g.memory({b, s.kv_heads, d, n}, {n * s.k_stride, d, 1, s.k_stride}, CUDNN_DATA_BFLOAT16, ragged[1]);
  // The backward wants the values transposed, as the keys are.
  p.v = s.backward ? g.memory({b, s.kv_heads, d, n}, {n * s.v_stride, d, 1, s.v_stride}, CUDNN_DATA_BFLOAT16, ragged[2])
                   : g.memory({b, s.kv_heads, n, d}, {n * s.v_stride, d, s.v_stride, 1}, CUDNN_DATA_BFLOAT16, ragged[2]);
  p.out = g.memory({b, s.heads, n, d}, {n * s.out_stride, d, s.out_stride, 1}, CUDNN_DATA_BFLOAT16, ragged[3]);
  if (s.stats) p.stats = g.memory({b, s.heads, n, 1}, {n, s.rows, 1, 1}, CUDNN_DATA_FLOAT, ragged[4]);
  p.scale = g.number(), p.low = g.number();
  if (s.window > 0) p.window = g.number(), ids.window = p.window.id;  // in f32: the form that engines know
  ids.q = p.q.id, ids.k = p.k.id, ids.v = p.v.id, ids.out = p.out.id, ids.stats = p.stats.id, ids.scale = p.scale.id, ids.low = p.low.id;
  return p;
}

/// Scores past a sequence's end.
Tensor pad_mask(CudnnGraph& g, const Parts& p, const Tensor& x) {
  const Tensor row = g.between(x.size, CUDNN_DATA_INT32), column = g.between(x.size, CUDNN_DATA_INT32);
  const Tensor row_in = g.between(x.size, CUDNN_DATA_BOOLEAN), column_in = g.between(x.size, CUDNN_DATA_BOOLEAN), in = g.between(x.size, CUDNN_DATA_BOOLEAN);
  const Tensor y = g.between(x.size);
  g.index(2, x, row), g.index(3, x, column);
  g.binary(CUDNN_POINTWISE_CMP_LT, row, p.lengths, row_in, CUDNN_DATA_BOOLEAN);
  g.binary(CUDNN_POINTWISE_CMP_LT, column, p.lengths, column_in, CUDNN_DATA_BOOLEAN);
  g.binary(CUDNN_POINTWISE_LOGICAL_AND, row_in, column_in, in, CUDNN_DATA_BOOLEAN);
  g.select(x, p.low, in, y);
  return y;
}

/// Scores of keys after the query; with a window, then those of keys too far before it.
Tensor causal_mask(CudnnGraph& g, const Parts& p, const CudnnShape& s, const Tensor& x) {
  const Tensor row = g.between(x.size, CUDNN_DATA_INT32), column = g.between(x.size, CUDNN_DATA_INT32), seen = g.between(x.size, CUDNN_DATA_BOOLEAN), y = g.between(x.size);
  g.index(2, x, row), g.index(3, x, column);
  g.binary(CUDNN_POINTWISE_CMP_GE, row, column, seen, CUDNN_DATA_BOOLEAN);
  g.select(x, p.low, seen, y);
  if (s.window == 0) return y;
  const Tensor late = g.between(x.size, CUDNN_DATA_INT32), end = g.between(x.size, CUDNN_DATA_INT32), reach = g.between(x.size);
  const Tensor near = g.between(x.size, CUDNN_DATA_BOOLEAN), z = g.between(x.size);
  g.index(2, y, late), g.index(3, y, end);
  g.binary(CUDNN_POINTWISE_ADD, end, p.window, reach);
  g.binary(CUDNN_POINTWISE_CMP_GT, reach, late, near, CUDNN_DATA_BOOLEAN);
  g.select(y, p.low, near, z);
  return z;
}

CudnnGraph forward_graph(const CudnnLibrary& library, const CudnnShape& s, Ids& ids) {
  CudnnGraph g(library);
  const Parts p = inputs(g, s, ids);
  const std::int64_t b = s.batch, h = s.heads, n = s.length;
  const Four scores{b, h, n, n}, rows{b, h, n, 1};
  const Tensor* lengths = s.ragged ? &p.lengths : nullptr;
  const Tensor product = g.between(scores), scaled = g.between(scores);
  g.product(p.q, p.k, product, lengths, lengths, nullptr, s.ragged ? std::optional<double>(0.0) : std::nullopt);
  g.binary(CUDNN_POINTWISE_MUL, product, p.scale, scaled);
  const Tensor masked = causal_mask(g, p, s, s.ragged ? pad_mask(g, p, scaled) : scaled);
  const Tensor top = g.between(rows), less = g.between(scores), e = g.between(scores), sum = g.between(rows), probability = g.between(scores, CUDNN_DATA_BFLOAT16);
  g.reduce(CUDNN_REDUCE_TENSOR_MAX, masked, top);
  g.binary(CUDNN_POINTWISE_SUB, masked, top, less);
  g.unary(CUDNN_POINTWISE_EXP, less, e);
  g.reduce(CUDNN_REDUCE_TENSOR_ADD, e, sum);
  if (s.stats) {
    const Tensor log = g.between(rows);
    g.unary(CUDNN_POINTWISE_LOG, sum, log);
    g.binary(CUDNN_POINTWISE_ADD, top, log, p.stats);
  }
  g.binary(CUDNN_POINTWISE_DIV, e, sum, probability);
  g.product(probability, p.v, p.out, lengths, nullptr, lengths);
  return g;
}

CudnnGraph backward_graph(const CudnnLibrary& library, const CudnnShape& s, Ids& ids) {
  CudnnGraph g(library);
  Parts p = inputs(g, s, ids);
  const std::int64_t b = s.batch, h = s.heads, hk = s.kv_heads, n = s.length, d = s.head_size;
  const Four scores{b, h, n, n}, rows{b, h, n, 1}, heads{b, h, n, d}, kv{b, hk, n, d}, turned{b, h, n, n};
  const Tensor *lengths = nullptr, *dq_ragged = nullptr, *dkv_ragged = nullptr, *out_ragged = nullptr, *stats_ragged = nullptr;
  if (s.ragged) {
    p.dkv_offsets = g.memory({b + 1, 1, 1, 1}, {1, 1, 1, 1}, CUDNN_DATA_INT32);
    ids.dkv_offsets = p.dkv_offsets.id;
    out_ragged = &p.offsets[3], stats_ragged = &p.offsets[4], dq_ragged = &p.offsets[5], dkv_ragged = &p.dkv_offsets;
  }
  if (masks_ends(s)) lengths = &p.lengths;
  const Tensor dout = g.memory(heads, {n * s.dout_stride, d, s.dout_stride, 1}, CUDNN_DATA_BFLOAT16, out_ragged);
  const Tensor dq = g.memory(heads, {n * s.dq_stride, d, s.dq_stride, 1}, CUDNN_DATA_BFLOAT16, dq_ragged);
  const Tensor dk = g.memory(kv, {n * s.dkv_stride, d, s.dkv_stride, 1}, CUDNN_DATA_BFLOAT16, dkv_ragged);
  const Tensor dv = g.memory(kv, {n * s.dkv_stride, d, s.dkv_stride, 1}, CUDNN_DATA_BFLOAT16, dkv_ragged);
  const Tensor one = g.number();
  ids.dout = dout.id, ids.dq = dq.id, ids.dk = dk.id, ids.dv = dv.id, ids.one = one.id;

  // sums = sum over columns of dout * out.
  const Tensor both = g.between(heads, {h * n * d, n * d, h * d, 1}), row_sum = g.between(rows);
  const Tensor sums = s.ragged ? g.memory(rows, p.stats.stride, CUDNN_DATA_FLOAT, stats_ragged) : g.memory(rows, CudnnGraph::packed(rows), CUDNN_DATA_FLOAT);
  ids.sums = sums.id;
  g.binary(CUDNN_POINTWISE_MUL, dout, p.out, both);
  g.reduce(CUDNN_REDUCE_TENSOR_ADD, both, row_sum);
  g.binary(CUDNN_POINTWISE_MUL, row_sum, one, sums);

  // Probabilities, and the values' gradient.
  const Tensor product = g.between(scores), scaled = g.between(scores), less = g.between(scores), probability = g.between(scores);
  g.product(p.q, p.k, product, lengths, lengths);
  g.binary(CUDNN_POINTWISE_MUL, product, p.scale, scaled);
  g.binary(CUDNN_POINTWISE_SUB, masks_ends(s) ? pad_mask(g, p, scaled) : scaled, p.stats, less);
  g.unary(CUDNN_POINTWISE_EXP, causal_mask(g, p, s, less), probability);
  const Four turned_stride{h * n * n, n * n, 1, n};
  const auto gather_heads = [&](const Tensor& left, const Tensor& right, const Tensor& to, std::int64_t& id) {
    if (h == hk) {
      g.product(left, right, to, lengths, nullptr, lengths);
      return;
    }
    // Each query head has its own gradient first, then those of a group are added.
    const std::int64_t wide = s.dkv_stride * (h / hk);
    const Tensor whole = s.ragged ? g.memory({b, h, n, d}, {n * wide, d, wide, 1}, CUDNN_DATA_BFLOAT16, dkv_ragged) : g.between({b, h, n, d}, CUDNN_DATA_BFLOAT16);
    if (s.ragged) id = whole.id;
    g.product(left, right, whole, lengths, nullptr, lengths);
    g.reduce(CUDNN_REDUCE_TENSOR_ADD, whole, to);
  };
  const Tensor probability_turned = g.between(turned, turned_stride, CUDNN_DATA_BFLOAT16);
  g.reshape(probability, probability_turned);
  gather_heads(probability_turned, dout, dv, ids.dv_heads);

  // The scores' gradient, and from it the keys' and queries'.
  const Tensor dp = g.between(scores), centred = g.between(scores), dscore = g.between(scores), ds = g.between(scores);
  g.product(dout, p.v, dp, lengths, lengths);
  g.binary(CUDNN_POINTWISE_SUB, dp, sums, centred);
  g.binary(CUDNN_POINTWISE_MUL, centred, probability, dscore);
  g.binary(CUDNN_POINTWISE_MUL, dscore, p.scale, ds);
  const Tensor ds_turned = g.between(turned, turned_stride, CUDNN_DATA_BFLOAT16);
  g.reshape(ds, ds_turned);
  gather_heads(ds_turned, p.q, dk, ids.dk_heads);
  const Tensor keys = g.between(kv, {p.k.stride[0], p.k.stride[1], p.k.stride[3], p.k.stride[2]}, CUDNN_DATA_BFLOAT16, s.ragged ? &p.offsets[1] : nullptr);
  g.reshape(p.k, keys);
  if (s.ordered) {
    g.product(ds, keys, dq, lengths, nullptr, lengths);
  } else {
    const Tensor dq_sums = s.ragged ? g.memory(heads, dq.stride, CUDNN_DATA_FLOAT, dq_ragged) : g.memory(heads, CudnnGraph::packed(heads), CUDNN_DATA_FLOAT);
    ids.dq_sums = dq_sums.id;
    g.product(ds, keys, dq_sums, lengths, nullptr, lengths);
    g.unary(CUDNN_POINTWISE_IDENTITY, dq_sums, dq);
  }
  return g;
}

std::int64_t round_up(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

struct CudnnAttention::State {
  struct Entry {
    Ids ids;
    std::unique_ptr<CudnnPlan> plan;
    std::string why;       ///< why there is none
    bool no_room = false;  ///< there would be one without the limit
  };
  CudnnLibrary library;
  cudnnHandle_t handle = nullptr;
  std::map<CudnnShape, Entry> entries;

  ~State() {
    entries.clear();
    if (handle != nullptr) library.destroy(handle);
  }
  Entry& entry(const CudnnShape& shape, std::int64_t most) {  // one limit for all calls of a shape
    const auto found = entries.find(shape);
    if (found != entries.end()) return found->second;
    Entry e;
    try {
      CudnnGraph graph = shape.backward ? backward_graph(library, shape, e.ids) : forward_graph(library, shape, e.ids);
      e.plan = std::make_unique<CudnnPlan>(library, handle, std::move(graph), most);
    } catch (const CudnnNoRoom& error) {
      e.why = error.what(), e.no_room = true;
    } catch (const std::exception& error) {
      e.why = error.what();
    }
    return entries.emplace(shape, std::move(e)).first->second;
  }
};

CudnnAttention::CudnnAttention(Context& ctx) : state_(std::make_unique<State>()) {
  state_->library.check(state_->library.create(&state_->handle), "starting");
  state_->library.check(state_->library.set_stream(state_->handle, ctx.stream()), "choosing the stream");
}
CudnnAttention::~CudnnAttention() = default;

std::int64_t CudnnAttention::version() const { return static_cast<std::int64_t>(state_->library.version()); }
std::int64_t CudnnAttention::plans() const { return static_cast<std::int64_t>(state_->entries.size()); }

void CudnnAttention::check_graphs(const CudnnShape& shape) {
  const CudnnLibrary library;
  CudnnShape s = shape;
  for (const bool backward : {false, true}) {
    s.backward = backward;
    Ids ids;
    CudnnGraph graph = backward ? backward_graph(library, s, ids) : forward_graph(library, s, ids);
    CudnnPlan::check(library, nullptr, graph);
  }
}

std::vector<std::string> CudnnAttention::operations(const CudnnShape& shape) {
  const CudnnLibrary library;
  Ids ids;
  return (shape.backward ? backward_graph(library, shape, ids) : forward_graph(library, shape, ids)).names();
}

bool CudnnAttention::forward(Context& ctx, const Attention& a, std::int64_t workspace_limit) {
  const CudnnShape shape = cudnn_shape(a, false, false);
  State::Entry& e = state_->entry(shape, workspace_limit);
  why_ = e.why;
  if (!e.plan) return false;
  const std::int64_t pitch = ragged_pitch(shape.batch);
  const std::int64_t offsets = shape.ragged ? round_up(6 * pitch * 4) : 0;
  auto* base = static_cast<char*>(ctx.scratch(offsets + e.plan->workspace() + 256));
  const float scale = static_cast<float>(a.scale), low = -std::numeric_limits<float>::infinity();
  std::vector<CudnnPlan::Pointer> pointers{{e.ids.q, a.q}, {e.ids.k, a.k}, {e.ids.v, a.v}, {e.ids.out, a.out}, {e.ids.scale, &scale}, {e.ids.low, &low}};
  const auto window = static_cast<float>(shape.window);
  if (window > 0) pointers.push_back({e.ids.window, &window});
  if (shape.stats) pointers.push_back({e.ids.stats, a.lse});
  if (shape.ragged) {
    auto* o = reinterpret_cast<std::int32_t*>(base);
    ragged_offsets(ctx, a.starts, a.sequences, shape.batch, {5, {a.q_stride, a.k_stride, a.v_stride, a.out_stride, 1}}, o);
    for (int i = 0; i < 5; ++i)
      if (i < 4 || shape.stats) pointers.push_back({e.ids.offsets[i], o + i * pitch});
    pointers.push_back({e.ids.lengths, o + 5 * pitch});
  }
  e.plan->run(state_->handle, pointers, base + offsets);
  last_workspace_ = e.plan->workspace();
  return true;
}

bool CudnnAttention::backward(Context& ctx, const Attention& a, bool ordered, std::int64_t workspace_limit) {
  CudnnShape shape = cudnn_shape(a, true, ordered);
  shape.padded = cudnn_wants_padding(shape, version());
  const std::int64_t batches = shape.batch, kv_heads = shape.kv_heads, group = a.heads / a.kv_heads;
  if (ordered && shape.ragged) {
    why_ = "[cudnn] a backward in one order is not made for sequences of different lengths";
    return false;
  }
  if (!shape.ragged) {
    const auto piece = [&](const CudnnChunk& chunk) {
      CudnnShape s = shape;
      s.batch = chunk.batch, s.kv_heads = chunk.kv_heads, s.heads = chunk.kv_heads * group;
      return s;
    };
    // Smaller pieces until their plan works within the limit; another reason against one is a reason against all.
    const CudnnChunk largest = ordered ? cudnn_ordered_chunk(shape, workspace_limit) : CudnnChunk{batches, kv_heads};
    const CudnnChunk chunk = cudnn_fit(shape, largest, [&](const CudnnChunk& c) { return !state_->entry(piece(c), workspace_limit).no_room; });
    if (chunk.kv_heads == 0) {
      why_ = "[cudnn] a backward does not fit the workspace of " + std::to_string(workspace_limit) + " bytes for one head of " + std::to_string(shape.length) + " tokens";
      return false;
    }
    shape = piece(chunk);
    // Pieces begin somewhere in the log-sums, of which the graph promises 16 bytes.
    if ((batches > shape.batch && shape.batch * shape.length % 4 != 0) || (kv_heads > shape.kv_heads && shape.heads * a.rows % 4 != 0)) {
      why_ = "[cudnn] a backward in pieces that do not begin on 16 bytes: " + std::to_string(shape.length) + " tokens";
      return false;
    }
  }
  State::Entry& e = state_->entry(shape, workspace_limit);
  why_ = e.why;
  if (!e.plan) return false;
  const std::int64_t head_rows = shape.ragged ? a.rows * a.heads : shape.batch * shape.heads * shape.length;
  const std::int64_t pitch = ragged_pitch(shape.batch);
  const std::int64_t offset_bytes = shape.ragged || shape.padded ? round_up(8 * pitch * 4) : 0, sum_bytes = round_up(head_rows * 4);
  const std::int64_t dq_bytes = shape.ordered ? 0 : round_up(shape.ragged ? a.rows * a.dq_stride * 4 : head_rows * a.head_size * 4);
  const std::int64_t dkv_bytes = shape.ragged && group > 1 ? round_up(a.rows * a.dkv_stride * group * 2) : 0;
  auto* base = static_cast<char*>(ctx.scratch(offset_bytes + sum_bytes + dq_bytes + 2 * dkv_bytes + e.plan->workspace() + 256));
  char *sums = base + offset_bytes, *dq_sums = sums + sum_bytes, *dk_heads = dq_sums + dq_bytes, *dv_heads = dk_heads + dkv_bytes, *workspace = dv_heads + dkv_bytes;
  const float scale = static_cast<float>(a.scale), low = -std::numeric_limits<float>::infinity(), one = 1;
  const auto window = static_cast<float>(shape.window);
  auto* o = reinterpret_cast<std::int32_t*>(base);
  if (shape.ragged)
    ragged_offsets(ctx, a.starts, a.sequences, shape.batch, {7, {a.q_stride, a.k_stride, a.v_stride, a.out_stride, 1, a.dq_stride, a.dkv_stride}}, o);
  else if (shape.padded) ragged_offsets(ctx, a.starts, a.sequences, shape.batch, {}, o);  // the lengths alone
  // Piece by piece: batches and heads do not touch each other.
  for (std::int64_t b = 0; b < batches; b += shape.batch)
    for (std::int64_t g = 0; g < kv_heads; g += shape.kv_heads) {
      const std::int64_t row = b * shape.length, q_column = g * group * a.head_size, kv_column = g * a.head_size;
      const auto at = [&](const void* p, std::int64_t stride, std::int64_t column) { return static_cast<const char*>(p) + (row * stride + column) * 2; };
      std::vector<CudnnPlan::Pointer> pointers{{e.ids.q, at(a.q, a.q_stride, q_column)},
                                               {e.ids.k, at(a.k, a.k_stride, kv_column)},
                                               {e.ids.v, at(a.v, a.v_stride, kv_column)},
                                               {e.ids.out, at(a.out, a.out_stride, q_column)},
                                               {e.ids.dout, at(a.dout, a.dout_stride, q_column)},
                                               {e.ids.dq, at(a.dq, a.dq_stride, q_column)},
                                               {e.ids.dk, at(a.dk, a.dkv_stride, kv_column)},
                                               {e.ids.dv, at(a.dv, a.dkv_stride, kv_column)},
                                               {e.ids.stats, static_cast<const float*>(a.lse) + g * group * a.rows + row},
                                               {e.ids.sums, sums},
                                               {e.ids.scale, &scale},
                                               {e.ids.low, &low},
                                               {e.ids.one, &one}};
      if (window > 0) pointers.push_back({e.ids.window, &window});
      if (e.ids.dq_sums != 0) pointers.push_back({e.ids.dq_sums, dq_sums});
      if (e.ids.dk_heads != 0) pointers.push_back({e.ids.dk_heads, dk_heads}), pointers.push_back({e.ids.dv_heads, dv_heads});
      if (shape.ragged) {
        for (int i = 0; i < 6; ++i) pointers.push_back({e.ids.offsets[i], o + i * pitch});
        pointers.push_back({e.ids.dkv_offsets, o + 6 * pitch}), pointers.push_back({e.ids.lengths, o + 7 * pitch});
      } else if (shape.padded) {
        pointers.push_back({e.ids.lengths, o});
      }
      e.plan->run(state_->handle, pointers, workspace);
    }
  last_workspace_ = e.plan->workspace();
  return true;
}

}  // namespace capstan::kernels::cuda
#endif
