// Embedding and cross-entropy over a cut vocabulary. Log-sum-exps of the parts combine to the whole's:
// lse = log sum_r e^lse_r, entropy = lse - sum_r e^(lse_r - lse) (lse_r - entropy_r).
#include "parallel/vocabulary.h"

#include "ops/common.h"
#include "ops/gather.h"
#include "ops/head_pass.h"
#include "parallel/collectives.h"

#include <memory>
#include <string>
#include <vector>

namespace capstan::parallel {

namespace {

using ops::HeadPass;
using ops::real;

/// This rank's part of the vocabulary, as the passes over its logits need it.
struct Share {
  Tensor targets;  ///< i32 [T], within this rank's rows of the weight; -1: none, or another's
  Tensor mine;     ///< [T], 1 where this rank has the target
  Tensor others;   ///< [T], 1 where another rank has it
  Tensor any;      ///< [T], their sum

  Share(const Tensor& global, std::int64_t begin, std::int64_t count, DType compute) {
    Device& device = global.device();
    const Dims shape = global.shape();
    targets = Tensor::empty(shape, DType::i32, device), mine = Tensor::empty(shape, compute, device);
    others = Tensor::empty(shape, compute, device);
    const double written = real(targets.bytes() + mine.bytes() + others.bytes());
    ops::run(device, HeadPass::op, {0, real(global.bytes()), written}, [&](ops::Backend& backend) {
      backend.local_ids(global.numel(), global.data<std::int32_t>(), begin, count, targets.data<std::int32_t>(),
                        ops::num(compute), mine.raw(), others.raw());
    });
    any = ops::add(mine, others);
  }
};

/// Scores of rows [row, row + rows) from this rank's logits of them and what the others say of theirs, into `out`.
void combine(const HeadPass& p, const Share& share, std::int64_t row, std::int64_t rows, const ops::HeadScore& out,
             Communicator& comm) {
  Device& device = p.x.device();
  const Tensor stats = Tensor::empty(Dims{3, rows}, p.compute, device);  // log-sum-exp, entropy, the target's logit
  const auto line = [&](const Tensor& t, std::int64_t i) { return t.narrow(0, i, 1).view(Dims{rows}); };
  const Tensor lse = line(stats, 0), entropy = line(stats, 1), chosen = line(stats, 2);
  {
    const double elements = real(rows * p.v), bytes = elements * real(size_of(p.compute));
    OpScope scope(device, "head softmax", {3 * elements, bytes, 0});
    if (p.v == 0) {
      lse.fill(-1e30), entropy.fill(0), chosen.fill(0);  // a part that weighs nothing
    } else if (!scope.meta()) {
      kernels::ScoreRows s = p.chunk_rows(row, rows, Tensor(), Tensor(), Tensor());
      s.logprob = chosen.raw(), s.logsumexp = lse.raw(), s.entropy = entropy.raw();
      device.backend().score_rows(s);
    }
  }
  if (p.v > 0)
    chosen.copy_from(ops::add(chosen, ops::mul(lse, share.mine.narrow(0, row, rows))));  // the kernel leaves logit - lse
  const Tensor all = gather_rows(stats, comm).view(Dims{comm.size(), 3, rows});
  const auto of_all = [&](std::int64_t i) { return all.narrow(1, i, 1).contiguous().view(Dims{comm.size(), rows}); };
  const Tensor lses = of_all(0), highest = ops::max(lses, 0);
  const Tensor parts = ops::exp(ops::sub(lses, highest)), sum = ops::sum(parts, 0), whole = ops::add(highest, ops::log(sum));
  const Tensor mean_logit = ops::div(ops::sum(ops::mul(parts, ops::sub(lses, of_all(1))), 0), sum);
  out.logsumexp.narrow(0, row, rows).copy_from(whole);
  out.entropy.narrow(0, row, rows).copy_from(ops::sub(whole, mean_logit));
  const Tensor logprob = ops::sub(ops::sum(of_all(2), 0), whole);
  out.logprob.narrow(0, row, rows).copy_from(ops::mul(logprob, share.any.narrow(0, row, rows)));
}

/// What the backward of a chunk reads, [T] each in the compute type; undefined: zero.
struct ScoreGradients {
  Tensor logprob, logsumexp, entropy;

  /// d/d logit_j of this rank's columns = p_j (g_lse - g_logprob) - ... + [j is the target] g_logprob. The kernel leaves
  /// g_logprob out of rows without a target: where another rank has it, it comes in by g_lse.
  static ScoreGradients of(const Tensor& g_logprob, const Tensor& g_logsumexp, const Tensor& g_entropy, const Share& share) {
    ScoreGradients g{g_logprob, g_logsumexp, g_entropy};
    if (g_logprob.defined()) {
      const Tensor elsewhere = ops::mul(g_logprob, share.others);
      g.logsumexp = g_logsumexp.defined() ? ops::sub(g_logsumexp, elsewhere) : ops::scale(elsewhere, -1);
    }
    return g;
  }
};

void differentiate(const HeadPass& p, std::int64_t row, std::int64_t rows, const ops::HeadScore& out,
                   const ScoreGradients& g) {
  const double elements = real(rows * p.v), bytes = elements * real(size_of(p.compute));
  OpScope scope(p.x.device(), "head softmax", {3 * elements, bytes, bytes});
  if (scope.meta()) return;
  kernels::ScoreRows s = p.chunk_rows(row, rows, Tensor(), out.logsumexp, out.entropy);
  const auto at = [&](const Tensor& t) { return t.defined() ? t.narrow(0, row, rows).raw() : nullptr; };
  s.g_logprob = at(g.logprob), s.g_logsumexp = at(g.logsumexp), s.g_entropy = at(g.entropy);
  s.narrow = p.narrow.defined() ? p.narrow.raw() : nullptr;
  p.x.device().backend().score_rows_backward(s);
}

/// dX and dW of a chunk whose logits' gradient is there.
void products(const HeadPass& p, std::int64_t row, std::int64_t rows, const Tensor& dx, const ops::WeightGradient& dw) {
  Device& device = p.x.device();
  if (dx.defined()) {
    OpScope scope(device, "head dx", p.gemm_cost(rows));
    if (!scope.meta()) p.dx_chunk(p.gradient(), row, rows, dx);
  }
  if (dw.value.defined()) {
    OpScope scope(device, "head dw", p.gemm_cost(rows));
    if (!scope.meta()) p.dw_chunk(p.gradient(), row, rows, dw.value, row > 0 || !dw.overwrite);
  }
}

void logits_of(const HeadPass& p, std::int64_t row, std::int64_t rows) {
  OpScope scope(p.x.device(), "head logits", p.gemm_cost(rows));
  if (!scope.meta() && p.v > 0) p.forward_chunk(row, rows);
}

/// The gradient of all rows by this rank's columns: zero when it has none.
Tensor unwritten(const HeadPass& p) {
  return p.v == 0 ? Tensor::zeros(p.x.shape(), p.x.dtype(), p.x.device())
                  : Tensor::empty(p.x.shape(), p.x.dtype(), p.x.device());
}

/// [T] of all ranks -> this rank's stream rows.
Tensor own(const Tensor& all, const Communicator& comm) {
  const std::int64_t rows = all.size(0) / comm.size();
  return all.narrow(0, comm.rank() * rows, rows);
}

std::int64_t widest(std::int64_t vocabulary, const Communicator& comm) {
  return (vocabulary + comm.size() - 1) / comm.size();
}

/// With gradients of the scores known only later: rows are gathered and logits computed again, chunk by chunk.
class VocabScoreNode final : public Node {
 public:
  Tensor x, weight;
  std::unique_ptr<Share> share;
  ops::HeadScore scores;  // of all rows
  std::int64_t vocabulary = 0;
  Communicator* comm = nullptr;
  std::string_view name() const override { return HeadPass::op; }
  void release() override { x = weight = Tensor(), share.reset(), scores = {}; }

  std::vector<Tensor> backward(std::span<const Tensor> grads, Part part) override {
    std::vector<Tensor> result(2);
    const HeadPass p(gather_rows(x, *comm), weight, share->targets, widest(vocabulary, *comm));
    Tensor all[3];  // gradients of the scores of all rows: each rank has those of its own
    for (std::size_t i = 0; i < 3; ++i)
      if (grads[i].defined()) all[i] = gather_rows(grads[i].detach().to(p.compute).contiguous(), *comm);
    const ScoreGradients g = ScoreGradients::of(all[0], all[1], all[2], *share);
    Tensor dx;
    if (wants(0, part)) dx = unwritten(p);
    ops::WeightGradient dw;
    if (wants(1, part)) dw = ops::WeightGradient::of(leaf(1), weight);
    for (std::int64_t row = 0; row < p.t && p.v > 0; row += p.chunk) {
      const std::int64_t rows = std::min(p.chunk, p.t - row);
      logits_of(p, row, rows);
      differentiate(p, row, rows, scores, g);
      products(p, row, rows, dx, dw);
    }
    if (dx.defined()) result[0] = reduce_scatter_rows(dx, *comm);
    if (dw.leaf != nullptr)
      dw.leaf->done();
    else if (dw.value.defined())
      result[1] = dw.value.to(weight.dtype());
    return result;
  }
};

}  // namespace

Tensor vocab_embedding(const Tensor& table, const Tensor& ids, std::int64_t begin, std::int64_t vocabulary,
                       Communicator& comm) {
  constexpr const char* op = "embedding";
  ops::check_floating(op, "table", table);
  if (table.rank() != 2) ops::wrong(op, "table's shape", "[V, C]", to_string(table.shape()));
  ops::check_ids(op, "ids", ids, DType::i32, table);
  Device& device = table.device();
  ops::check_rows(op, ids, vocabulary);
  const Tensor all = ids.detach().contiguous(), local = Tensor::empty(ids.shape(), DType::i32, device);
  ops::run(device, op, {0, real(all.bytes()), real(local.bytes())}, [&](ops::Backend& backend) {
    backend.local_ids(all.numel(), all.data<std::int32_t>(), begin, table.size(0), local.data<std::int32_t>(),
                      ops::num(DType::f32), nullptr, nullptr);
  });
  return reduce_scatter_rows(ops::gather_checked(op, table, local), comm);
}

ops::HeadScore vocab_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor* weights,
                                   bool grad, std::int64_t begin, std::int64_t vocabulary, Communicator& comm) {
  constexpr const char* op = HeadPass::op;
  if (x.rank() != 2 || weight.rank() != 2 || x.size(1) != weight.size(1) || x.dtype() != weight.dtype())
    fail(Fault::programming, op,
         "shapes: expected x [T / ranks, C] and weight [V, C] of one element type, got " + to_string(x.shape()) + " and " +
             to_string(weight.shape()));
  const Dims rows_of_all{x.size(0) * comm.size()};
  if (!(targets.shape() == rows_of_all) || targets.dtype() != DType::i32)
    fail(Fault::programming, op,
         "targets: expected i32 " + to_string(rows_of_all) + ", got " + std::string(name_of(targets.dtype())) + " " +
             to_string(targets.shape()));
  if (weights != nullptr && (!(weights->shape() == targets.shape()) || weights->dtype() != DType::f32))
    fail(Fault::programming, op,
         "weights: expected f32 " + to_string(targets.shape()) + ", got " + to_string(weights->shape()));
  Device& device = x.device();
  const Tensor ids = targets.detach().contiguous();
  if (!ids.is_meta()) {
    const std::int64_t bad = device.backend().first_outside(op, ids.numel(), ids.data<std::int32_t>(), -1, vocabulary);
    if (bad >= 0)
      fail(Fault::input, op,
           "target " + std::to_string(static_cast<std::int64_t>(ids.narrow(0, bad, 1).item())) + " of row " +
               std::to_string(bad) + " is outside the vocabulary of " + std::to_string(vocabulary) +
               ": the dataset was made with another tokenizer");
  }
  const DType type = ops::score_type(x.dtype());
  auto share = std::make_unique<Share>(ids, begin, weight.size(0), type);
  const HeadPass p(gather_rows(x.detach(), comm), weight.detach().contiguous(), share->targets, widest(vocabulary, comm));
  const Dims t{p.t};
  const ops::HeadScore all{Tensor::empty(t, type, device), Tensor::empty(t, type, device), Tensor::empty(t, type, device),
                           Tensor()};
  const bool differentiable = grad && any_requires_grad({&x, &weight});
  const bool now = differentiable && weights != nullptr;
  std::shared_ptr<ops::ObjectiveNode> node;
  ops::WeightGradient dw;
  Tensor dx;
  ScoreGradients gradients;
  if (now) {
    node = std::make_shared<ops::ObjectiveNode>();
    if (x.requires_grad()) dx = unwritten(p);
    if (weight.requires_grad()) dw = ops::WeightGradient::of(dynamic_cast<Leaf*>(weight.node().get()), weight);
    gradients = ScoreGradients::of(ops::scale(weights->detach().to(type), -1), Tensor(), Tensor(), *share);
  }
  for (std::int64_t row = 0; row < p.t; row += p.chunk) {
    const std::int64_t rows = std::min(p.chunk, p.t - row);
    logits_of(p, row, rows);
    combine(p, *share, row, rows, all, comm);
    if (!now || p.v == 0) continue;
    differentiate(p, row, rows, all, gradients);
    products(p, row, rows, dx, dw);
  }
  ops::HeadScore out{own(all.logprob, comm), own(all.logsumexp, comm), own(all.entropy, comm), Tensor()};
  if (weights != nullptr) {
    out.objective = Tensor::empty(Dims{}, type, device);
    const Tensor mine = own(weights->detach().contiguous(), comm);
    if (!out.objective.is_meta())
      device.backend().weighted_sum(ops::num(type), mine.numel(), mine.data<float>(), out.logprob.raw(),
                                    out.objective.raw());
  }
  if (now) {
    if (dx.defined()) node->dx = reduce_scatter_rows(dx, comm);
    node->leaf_done = dw.leaf;
    if (dw.value.defined() && dw.leaf == nullptr) node->dw = dw.value.to(weight.dtype());
    record(node, {&x, &weight}, {&out.objective});
  } else if (differentiable) {
    auto later = std::make_shared<VocabScoreNode>();
    later->x = x.detach().contiguous(), later->weight = p.weight, later->share = std::move(share);
    later->scores = all, later->vocabulary = vocabulary, later->comm = &comm;
    record(later, {&x, &weight}, {&out.logprob, &out.logsumexp, &out.entropy});
  }
  return out;
}

}  // namespace capstan::parallel
